"""What makes a small language model learn from slots fastest?

Tunes one recipe after the other from the same backbone and item table on about the same budget and
compares them on the validation users: mean reciprocal rank and HR@1 with intervals, paired tests
against the plain recipe, samples and seconds. Only validation is looked at.

    python experiments/compare_recipes.py
    python experiments/compare_recipes.py --only "pointer" --only "letters" --samples 1024

Cost: about 6 min per recipe on 2 cores with bf16. Last measured:
experiments/results/compare_recipes/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rsllm import Experiment, Pipeline, replace_in
from rsllm.cli import run_script
from rsllm.cluster import start_ray
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.compare import Claim, method_table, pair_table, per_user
from rsllm.evaluate.launch import Method, evaluate
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.report import show
from rsllm.runs import provenance, read_json, write_json

BASE = replace_in(
    Experiment(),
    {
        "stage1.samples": 0,
        "stage2.loss.alpha": 0.0,
        "stage2.loss.beta": 0.0,
        "stage2.loss.gamma": 3.0,
        "stage2.loss.scorer": "pointer",
        "stage2.validations": 2,
        "evaluation.generation_rows": -1,
    },
)

PLAIN = "pointer"
RECIPES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "learning rates x 2": {
        "stage2.lora_learning_rate": 1e-3,
        "stage2.projector_learning_rate": 1e-2,
    },
    "batch 4": {"stage2.batch_size": 4},
    "projector starts at titles": {"projector.start": "titles"},
    "contrasts": {"stage2.loss.alpha": 0.1, "stage2.loss.beta": 0.05},
    "without slots": {"stage2.representation": "text"},
    "letters": {"prompt.answer": "letter", "stage2.loss.scorer": "likelihood"},
    "title likelihood": {"stage2.loss.scorer": "likelihood"},
    "pointer, then title likelihood": {
        "stage1.representation": "unified",
        "stage1.loss": BASE.stage2.loss,
        "stage1.samples": 0.5,
        "stage2.samples": 0.5,
        "stage2.loss.scorer": "likelihood",
    },
    "slots alone, then unified": {
        "stage1.representation": "behavioural",
        "stage1.loss": BASE.stage2.loss,
        "stage1.samples": 2.0,
        "stage2.samples": 0.5,
    },
}
"""Paths into `Experiment`; samples are shares of the budget's."""


def recipe(name: str, samples: int) -> Experiment:
    """The experiment of a recipe."""
    shares = {"stage2.samples": 1.0} | RECIPES[name]
    counts = {p: round(samples * v) for p, v in shares.items() if p.endswith(".samples")}
    return replace_in(BASE, {**shares, **counts})


def compare(names: list[str], samples: int, storage: Path) -> dict[str, Any]:
    """Tune and judge each recipe."""
    methods, trained = [], {}
    for name in names:
        experiment = recipe(name, samples)
        pipeline = Pipeline(experiment, storage)
        folder, first = pipeline.train(), experiment.stage1.steps and pipeline.train_text()
        trained[name] = [read_json(path / "training.json") for path in (first, folder) if path]
        print(f"{name}: {trained[name][-1]['curve'][-1]['MRR']:.3f}", flush=True)
        methods.append(
            Method(
                name=name,
                scorer=experiment.stage2.loss.ranks_by,
                experiment=experiment,
                representation=experiment.stage2.representation,
                artifact=str(folder),
            )
        )
    usual = Pipeline(BASE, storage)
    data = PreparedData.open(usual.prepare())
    outcomes = evaluate(
        methods,
        "validation",
        data=data.path,
        backbone=usual.backbone,
        fingerprint=usual.fingerprint,
        layout=usual.layout,
        store=usual.store,
    )
    draws = held_out(data, "validation")
    vectors = {outcome.method.name: per_user(outcome.scores_DRC, draws) for outcome in outcomes}
    claims = [Claim(name, PLAIN) for name in names if name != PLAIN and PLAIN in names]
    return {
        "recipes": {name: RECIPES[name] for name in names},
        "samples": samples,
        "methods": method_table(outcomes, draws, data),
        "pairs": pair_table(vectors, claims, ["MRR"]),
        "training": trained,
    }


def _printed(result: dict[str, Any]) -> str:
    against = {pair["first"]: pair for pair in result["pairs"]}
    rows = []
    for method in result["methods"]:
        stages, pair = result["training"][method["name"]], against.get(method["name"])
        rows.append(
            {
                "recipe": method["name"],
                "MRR": show(method["metrics"]["MRR"]),
                "HR@1": show(method["metrics"]["HR@1"]),
                f"MRR less that of {PLAIN}": show(pair and pair["difference"]),
                "p (Holm)": show(pair and pair["p_holm"]),
                "samples": sum(int(stage["curve"][-1]["samples"]) for stage in stages),
                "seconds": sum(round(stage["seconds"]) for stage in stages),
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def main() -> None:
    """Compare the recipes; print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=RECIPES, action="append", help="recipes (default: all)")
    parser.add_argument("--samples", type=int, default=512, help="of each recipe (default: 512)")
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    arguments = parser.parse_args()
    print(f"Ray dashboard: {start_ray()}  (its token: ray get-auth-token)", flush=True)
    result = compare(arguments.only or list(RECIPES), arguments.samples, arguments.storage)
    folder = arguments.storage / "studies" / "compare_recipes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arguments.samples}.json"
    write_json(path, {**result, "base": BASE.data.source, "provenance": provenance()})
    print(f"\n{_printed(result)}\n\nresults: {path}", flush=True)


if __name__ == "__main__":
    run_script(main)
