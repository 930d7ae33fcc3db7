"""Which projector brings a recommender's items into the language model?

Searches width, depth, activation and normalisation of the projector, and the length its slots have
at the start, for validation MRR. Then trains the winner, the default projector and the winner as a
linear map at equal samples under a fresh seed, and compares them on the test split, once.

    python experiments/tune_projector.py                      # on this machine
    ray submit cluster/gpu.yaml experiments/tune_projector.py # on a cluster

Cost: see `--help`. Last measured: experiments/results/tune_projector/ ("full": not yet run).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.flags import Budget, parse
from rsllm.study.claims import Claim
from rsllm.study.study import Study, run

BASE = replace_in(
    Experiment(),
    {
        "stage2.loss.alpha": 0.0,
        "stage2.loss.beta": 0.0,
        "stage2.loss.gamma": 3.0,
        "stage2.loss.scorer": "pointer",
        "stage2.validations": 3,
    },
)

BUDGETS = {
    "quick": Budget(
        summary="11 min on 2 cores: shows the flow, no ranking",
        trials=3,
        seeds=1,
        overrides={
            "recommender.max_epochs": 3.0,
            "stage1.samples": 32,
            "stage2.samples": 96,
            "evaluation.validation_rows": 48,
            "evaluation.test_rows": 48,
            "evaluation.generation_rows": -1,
        },
    ),
    "full": Budget(
        summary="for GPUs, not yet measured: every held-out row, a long schedule, three seeds",
        trials=32,
        confirm_top=3,
        seeds=3,
        overrides={
            "stage1.samples": 8192,
            "stage1.batch_size": 32,
            "stage2.samples": 49152,
            "stage2.batch_size": 64,
            "stage2.validations": 6,
        },
    ),
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """A linear map (depth 0) has no hidden layers to choose."""
    values: dict[str, Any] = {
        "projector.depth": trial.suggest_int("depth", 0, 3),
        "projector.scale": trial.suggest_float("scale", 0.1, 10.0, log=True),
    }
    if values["projector.depth"] == 0:
        return values
    return values | {
        "projector.hidden": trial.suggest_int("hidden", 64, 1024, log=True),
        "projector.activation": trial.suggest_categorical("activation", ["gelu", "relu", "silu"]),
        "projector.norm": trial.suggest_categorical("norm", ["none", "layer", "rms"]),
    }


FIRST_GUESSES = [
    {"depth": 1, "scale": 1.0, "hidden": 256, "activation": "gelu", "norm": "none"},
    {"depth": 0, "scale": 1.0},
]


def twins(best: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The winner, what it would replace, and the winner without hidden layers if it has any."""
    found = {"tuned": dict(best), "default": {}}
    if best["projector.depth"]:
        found["tuned, linear"] = {**best, "projector.depth": 0}
    return found


CLAIMS = [
    Claim("tuned", "default", "tuning the projector helps"),
    Claim("tuned", "tuned, linear", "hidden layers help"),
    Claim("tuned", "recommender", "the language model beats the recommender"),
]


def main() -> None:
    """Read the flags, print the plan, run the study."""
    arguments = parse(__doc__ or "", BUDGETS, BASE)
    print(f"budget {arguments.budget_name}: {arguments.budget.summary}", flush=True)
    study = Study(
        title="Tune the projector",
        question="Which projector brings a recommender's items into the language model?",
        base=arguments.experiment,
        space=space,
        trials=arguments.trials,
        first_guesses=FIRST_GUESSES,
        twins=twins,
        twin_overrides={"stage2.validations": 1},
        claims=CLAIMS,
        num_seeds=arguments.seeds,
        confirm_top=arguments.budget.confirm_top,
        budget={"name": arguments.budget_name, "trials": arguments.trials},
        seed=arguments.seed,
        search=arguments.search,
    )
    run(study, arguments.storage)


if __name__ == "__main__":
    run_script(main)
