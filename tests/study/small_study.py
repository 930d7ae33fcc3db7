"""A whole study at the smallest scale: two trials, both confirmed on two seeds, one twin."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import optuna

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.study.claims import Claim
from rsllm.study.study import Study, run

SETTINGS = {
    "data.source": "synthetic",
    "compute.threads": 1,
    "data.window": 5,
    "data.num_candidates": 8,
    "data.num_draws": 2,
    "recommender.max_epochs": 1.0,
    "stage1.samples": 0,
    "stage2.samples": 16,
    "stage2.validations": 2,
    "stage2.loss.gamma": 3.0,
    "stage2.loss.scorer": "pointer",
    "evaluation.validation_rows": 8,
    "evaluation.test_rows": 12,
    "evaluation.generation_rows": 2,
    "evaluation.max_new_tokens": 4,
}
WINNER, PLAIN = "contrasts", "plain"


def space(trial: optuna.Trial) -> dict[str, Any]:
    """One weight."""
    return {"stage2.loss.alpha": trial.suggest_float("alpha", 0.1, 0.8)}


def twins(best: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The winner, and itself without contrasts."""
    return {WINNER: dict(best), PLAIN: {"stage2.loss.alpha": 0.0, "stage2.loss.beta": 0.0}}


def main() -> None:
    """Run the study on a backbone, in a storage, or continue it."""
    backbone, storage = sys.argv[1:]
    study = Study(
        title="Small study",
        question="Does it add up?",
        base=replace_in(Experiment(), {**SETTINGS, "backbone.source": backbone}),
        space=space,
        trials=2,
        first_guesses=[{"alpha": 0.2}],
        twins=twins,
        claims=[Claim(WINNER, PLAIN), Claim(WINNER, "recommender"), Claim(WINNER, "zero-shot")],
        num_seeds=2,
        confirm_top=2,
    )
    run(study, storage)
