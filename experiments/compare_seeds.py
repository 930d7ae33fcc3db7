"""How much of a short training is luck, and which recipe has the least of it?

A search that compares trials of one seed each finds good seeds, if seeds differ more than settings
do. Trains recipes on choice prompts (the paper's form) with our ranking loss, and one on history
prompts, on several seeds and two budgets. It shows the spread of their validation MRR, the highest
loss of a step over the median, and how fast each learns. Only validation is looked at.

    python experiments/compare_seeds.py --budget quick            # 96 samples
    python experiments/compare_seeds.py --budget long --set backbone.layers=12 --seeds 1 \
        --only "free slots" --only "history prompts"              # learning curves by seconds

Cost: see --help. Last measured: experiments/results/compare_seeds/.
"""

from __future__ import annotations

import statistics
from typing import Any

from tabulate import tabulate

from rsllm.cli import run_script
from rsllm.compute.start import start_ray
from rsllm.config import Experiment
from rsllm.config.plain import replace_in, to_dict
from rsllm.config.presets import HISTORIES
from rsllm.flags import Budget, parse
from rsllm.report.figures import write_figure
from rsllm.store.artifacts import Store, provenance, read_json, write_json
from rsllm.study.results import results_folder
from rsllm.study.variants import train

BASE = replace_in(
    Experiment(),
    {
        "stage1.samples": 0,
        "stage2.loss.gamma": 3.0,
        "stage2.loss.scorer": "pointer",
        "stage2.validations": 3,
        "data.split": "leave-one-out",
    },
)
BUDGETS = {
    "quick": Budget(
        summary="96 samples: 1 to 2 min a training of 12 layers on 2 cores that did other work",
        seeds=5,
        overrides={"stage2.samples": 96, "evaluation.validation_rows": 96},
    ),
    "long": Budget(
        summary="1,024 samples: 7 to 13 min a training of 12 layers on 2 cores that did other work",
        seeds=5,
        overrides={
            "stage2.samples": 1024,
            "stage2.validations": 8,
            "evaluation.validation_rows": 400,
        },
    ),
}
RECIPES: dict[str, dict[str, Any]] = {
    "free slots": {"projector.bounded": False, "stage2.projector_learning_rate": 5e-3},
    "bounded slots": {"projector.bounded": True, "stage2.projector_learning_rate": 2e-3},
    "slots that start at titles": {"projector.start": "titles"},
    "small steps": {
        "stage2.projector_learning_rate": 5e-4,
        "stage2.lora_learning_rate": 2e-4,
        "stage2.batch_size": 4,
        "stage2.warmup_share": 0.25,
    },
    "history prompts": {**HISTORIES, "stage2.loss.gamma": 0.0},
}
"""Free slots are the default on choice prompts: AdamW moves their projector by 30 % a step."""


def main() -> None:
    """Train every recipe on every seed, and show how far apart they end."""
    given = parse(__doc__ or "", BUDGETS, BASE, variants=list(RECIPES))
    start_ray()
    chosen = {name: RECIPES[name] for name in given.only or RECIPES}
    seeds = range(given.experiment.stage2.seed, given.experiment.stage2.seed + given.seeds)
    trained = train(chosen, given.experiment, seeds, given.storage)
    curves = {
        name: [read_json(pipeline.run() / "training.json")["curve"] for pipeline in group]
        for name, group in trained.items()
    }
    rows = []
    for name, group in curves.items():
        ends = [curve[-1]["MRR"] for curve in group]
        spikes = [max(point["health/loss_peak"] for point in curve) for curve in group]
        spread = statistics.stdev(ends) if len(ends) > 1 else None
        mean, worst = statistics.fmean(ends), max(spikes)
        rows.append([name, len(ends), mean, spread, min(ends), max(ends), worst])
    names = ["recipe", "seeds", "MRR", "sd over seeds", "lowest", "highest", "loss peak"]
    print(tabulate(rows, names, floatfmt=".3f"))
    found = {
        "experiment": to_dict(given.experiment),
        "recipes": chosen,
        "table": [dict(zip(names, row, strict=True)) for row in rows],
        "curves": curves,
        "provenance": provenance(),
    }
    with results_folder(Store.open(given.storage), given.named("compare-seeds")) as folder:
        write_json(folder / "results.json", found)
        write_figure(folder, lambda figure: draw(figure, curves))


def draw(figure: Any, curves: dict[str, list[list[dict[str, float]]]]) -> None:
    """Draw a column per recipe, a line per seed: by samples, and by seconds on the same scale."""
    figure.set_size_inches(3.2 * len(curves), 5.2)
    above, below = figure.subplots(2, len(curves), sharex="row", sharey="row", squeeze=False)
    for place, (name, group) in enumerate(curves.items()):
        for curve in group:
            samples, seconds, mrr, hits = (
                [point[key] for point in curve] for key in ("samples", "seconds", "MRR", "HR@1")
            )
            above[place].plot(samples, mrr, "o-")
            below[place].plot(seconds, hits, "o-")
        above[place].set(title=name, xlabel="training samples")
        below[place].set(xlabel="seconds of training")
    above[0].set_ylabel("validation MRR, a line per seed")
    below[0].set_ylabel("validation HR@1")


if __name__ == "__main__":
    run_script(main)
