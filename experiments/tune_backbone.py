"""Which recommender and which language model, at which cost?

Searches the pair, the adapter's rank and, where there is a recommender, the projector's width, for
two objectives: validation MRR against the device-seconds of tuning. No trial is stopped early, and
there is no stage 1, so that the seconds are all of a trial's tuning. The report shows the Pareto
front: the trials that no other beats in MRR for as little. The test split stays closed.

    python experiments/tune_backbone.py --budget quick
    ray submit cluster/gpu.yaml experiments/tune_backbone.py

Cost: see `--help`. Not yet run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.models import RECOMMENDERS
from rsllm.config.plain import replace_in
from rsllm.config.presets import preset
from rsllm.flags import Budget, parse
from rsllm.pipeline import Pipeline
from rsllm.study.search import Search, Space, publish

BASE = replace_in(
    Experiment(),
    {
        "stage1.samples": 0,
        "stage2.loss.alpha": 0.0,
        "stage2.loss.beta": 0.0,
        "stage2.loss.gamma": 3.0,
        "stage2.loss.scorer": "pointer",
        "stage2.validations": 1,
    },
)

BUDGETS = {
    "quick": Budget(
        summary="not yet timed: 6 short trials of one language model",
        trials=6,
        overrides={
            "recommender.max_epochs": 3.0,
            "stage2.samples": 96,
            "evaluation.validation_rows": 48,
        },
    ),
    "full": Budget(
        summary="for GPUs, not yet measured: 60 trials of three language models",
        trials=60,
        overrides={"stage2.samples": 24576, "stage2.batch_size": 64},
    ),
}

BACKBONES = {
    "quick": [],
    "full": ["HuggingFaceTB/SmolLM2-360M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"],
}
"""Beside the one of --backbone."""


def space_over(backbones: Sequence[str], data: str) -> Space:
    """Recommenders with the settings that were tuned for the data, or none, and backbones."""

    def space(trial: optuna.Trial) -> dict[str, Any]:
        rank = trial.suggest_int("rank", 2, 64, log=True)
        values = {
            "backbone.source": trial.suggest_categorical("backbone", backbones),
            "backbone.lora_rank": rank,
            "backbone.lora_alpha": 2 * rank,
        }
        model = trial.suggest_categorical("recommender", ["none", *RECOMMENDERS])
        if model == "none":
            return values | {"stage2.representation": "text"}
        hidden = trial.suggest_int("hidden", 64, 1024, log=True)
        return (
            {"recommender.model": model}
            | values
            | preset(model, data)
            | {"projector.hidden": hidden}
        )

    return space


def main() -> None:
    """Search, and report the trials and their front."""
    arguments = parse(__doc__ or "", BUDGETS, BASE)
    print(f"budget {arguments.budget_name}: {arguments.budget.summary}", flush=True)
    experiment = arguments.experiment
    backbones = [experiment.backbone.source, *BACKBONES[arguments.budget_name]]
    search = Search(
        pipeline=Pipeline(experiment, arguments.storage),
        space=space_over(backbones, experiment.data.source),
        name=arguments.named("tune-backbone"),
        cost=True,
        seed=arguments.seed,
        **arguments.search,
    )
    publish(
        search.pipeline,
        search.name,
        search.run(arguments.trials),
        cost=search.cost,
        title="Tune the backbone",
        question="Which recommender and which language model, at which cost?",
    )


if __name__ == "__main__":
    run_script(main)
