"""Which weights should RSLLM's losses have, and do its contrasts help?

Searches alpha, beta and the temperature of the two contrastive losses, and gamma, the weight of
our ranking loss (gamma = 0 is the paper), for validation MRR. Trains the best trials anew on fresh
seeds, of which the best mean on validation wins, then twins of the winner with and without
contrasts and ranking loss on the same seeds at equal samples, and compares them on the test split,
once. How to read what comes out: experiments/README.md.

    python experiments/tune_loss_weights.py                      # on this machine
    python experiments/tune_loss_weights.py --budget hour --seeds 3
    ray job submit --working-dir . -- python experiments/tune_loss_weights.py
    ray submit cluster/gpu.yaml experiments/tune_loss_weights.py # on a cluster

Cost: see `--help`. Last measured: experiments/results/tune_loss_weights/ ("full": not yet run).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.settings import replace_in
from rsllm.tune.arguments import Budget, parse
from rsllm.tune.study import BY_LIKELIHOOD, WINNER, Claim, Study, run

BASE = replace_in(Experiment(), {"stage2.loss.scorer": "pointer", "stage2.validations": 3})

BUDGETS = {
    "quick": Budget(
        summary="12 to 21 min on 2 cores: shows the flow, no ranking",
        trials=3,
        seeds=1,
        overrides={
            "recommender.max_epochs": 3.0,
            "stage1.samples": 32,
            "stage2.samples": 96,
            "evaluation.validation_rows": 48,
            "evaluation.test_rows": 48,
            "evaluation.generation_rows": 8,
            "evaluation.max_new_tokens": 16,
        },
    ),
    "hour": Budget(
        summary="about an hour on 2 cores (74 min measured on busy ones)",
        trials=4,
        seeds=1,
        overrides={
            "stage1.samples": 64,
            "stage2.samples": 144,
            "evaluation.validation_rows": 48,
            "evaluation.generation_rows": 24,
            "evaluation.max_new_tokens": 24,
        },
        twin_overrides={"stage2.samples": 512},
    ),
    "full": Budget(
        summary="for GPUs, not yet measured: every held-out row, a long schedule, three seeds",
        trials=24,
        confirm_top=3,
        seeds=3,
        overrides={
            "stage1.samples": 8192,
            "stage1.batch_size": 32,
            "stage2.samples": 49152,
            "stage2.batch_size": 64,
            "stage2.validations": 6,
        },
        twin_overrides={"stage2.validations": 6},
    ),
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Any share up to 0.9 for the contrasts, split between them; a ranking loss or none."""
    share = trial.suggest_float("contrast_share", 0.0, 0.9)
    split = trial.suggest_float("target_split", 0.0, 1.0)
    ranked = trial.suggest_categorical("ranked", [True, False])
    return {
        "stage2.loss.alpha": share * split,
        "stage2.loss.beta": share * (1 - split),
        "stage2.loss.temperature": trial.suggest_float("tau", 0.02, 0.5, log=True),
        "stage2.loss.gamma": trial.suggest_float("rank", 0.3, 10.0, log=True) if ranked else 0.0,
    }


FIRST_GUESSES = [
    {"contrast_share": 0.15, "target_split": 0.67, "ranked": True, "tau": 0.1, "rank": 3.0}
]


def twins(best: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The winner without its contrasts, without its ranking loss, and without both."""
    plain = {**best, "stage2.loss.alpha": 0.0, "stage2.loss.beta": 0.0}
    off = {"stage2.loss.gamma": 0.0}
    if not best["stage2.loss.gamma"]:
        return {"contrasts": dict(best), "language model": plain}
    return {
        "contrasts + ranking": dict(best),
        "ranking": plain,
        "contrasts": {**best, **off},
        "language model": {**plain, **off},
    }


CLAIMS = [
    Claim("contrasts + ranking", "ranking", "the contrasts help"),
    Claim("contrasts", "language model", "the contrasts help without the ranking loss"),
    Claim("contrasts + ranking", "contrasts", "the ranking loss, ranked by its pointer, helps"),
    Claim(
        "contrasts + ranking" + BY_LIKELIHOOD,
        "contrasts",
        "the ranking loss helps the likelihood of titles",
    ),
    Claim(WINNER, "zero-shot", "tuning helps"),
    Claim(WINNER + BY_LIKELIHOOD, "zero-shot", "tuning helps the likelihood of titles"),
    Claim(WINNER, "recommender", "the language model beats the recommender"),
]


def main() -> None:
    """Read the flags, print the plan, run the study."""
    arguments = parse(__doc__ or "", BUDGETS, BASE)
    print(f"budget {arguments.budget_name}: {arguments.budget.summary}", flush=True)
    study = Study(
        title="Tune loss weights",
        question="Which weights should RSLLM's losses have, and do its contrasts help?",
        base=arguments.experiment,
        space=space,
        trials=arguments.trials,
        first_guesses=FIRST_GUESSES,
        twins=twins,
        twin_overrides={"stage2.validations": 1, **arguments.budget.twin_overrides},
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
