"""Which weights should RSLLM's losses have, and do its contrasts help?

Searches alpha and beta, the weights of the two contrasts beside the language-model loss, for
validation MRR, on history prompts: the paper's three losses at every position (ours). Trains the
best trials anew on fresh seeds, of which the best mean on validation wins, then twins of the winner
without slots and without the target contrast on the same seeds at equal samples, and compares them
on the test split, once. How to read what comes out: experiments/README.md.

    python experiments/tune_loss_weights.py                      # on this machine
    python experiments/tune_loss_weights.py --budget hour --seeds 3
    ray job submit --working-dir . -- python experiments/tune_loss_weights.py
    ray submit cluster/gpu.yaml experiments/tune_loss_weights.py # on a cluster

The lower 12 layers of the backbone read, which is enough to rank; `--set backbone.layers=0` takes
all. The paper's form of a prompt, a choice among candidates, is `--set stage2.prompts=choice`.
Cost: see `--help`. Last measured: experiments/results/tune_loss_weights/ ("full": not yet run).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.config.presets import HISTORIES
from rsllm.flags import Budget, parse
from rsllm.study.claims import Claim
from rsllm.study.study import WINNER, Study, run

BASE = replace_in(
    Experiment(), {**HISTORIES, "data.split": "leave-one-out", "stage2.validations": 2}
)

BUDGETS = {
    "quick": Budget(
        summary="16 min on 2 cores: 5,200 next items a trial",
        trials=3,
        seeds=1,
        overrides={
            "stage2.samples": 288,
            "evaluation.validation_rows": 200,
            "evaluation.test_rows": 300,
        },
    ),
    "hour": Budget(
        summary="75 min on 2 busy cores: a third of an epoch a twin, all test users",
        trials=4,
        seeds=1,
        overrides={"stage2.samples": 640, "evaluation.validation_rows": 400},
        twin_overrides={"stage2.samples": 1280},
    ),
    "full": Budget(
        summary="for GPUs, not yet measured: all layers, five epochs, three seeds",
        trials=24,
        confirm_top=3,
        seeds=3,
        overrides={
            "backbone.layers": 0,
            "stage2.samples": 22016,
            "stage2.batch_size": 64,
            "stage2.validations": 6,
        },
        twin_overrides={"stage2.validations": 6},
    ),
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """From a third of the weight for the contrasts to nearly all of it, split between them."""
    share = trial.suggest_float("contrast_share", 0.3, 0.98)
    split = trial.suggest_float("target_split", 0.0, 0.8)
    return {"stage2.loss.alpha": share * split, "stage2.loss.beta": share * (1 - split)}


FIRST_GUESSES = [{"contrast_share": 0.9, "target_split": 0.1}]
WITHOUT_SLOTS, WITHOUT_TARGETS = "no slots", "no target contrast"


def twins(best: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The winner, the same without slots, and the same without the target contrast."""
    return {
        "RSLLM": dict(best),
        WITHOUT_SLOTS: {**best, "stage2.representation": "text"},
        WITHOUT_TARGETS: {**best, "stage2.loss.alpha": 0.0},
    }


CLAIMS = [
    Claim(WINNER, WITHOUT_SLOTS, "slots help"),
    Claim(WINNER, "zero-shot", "tuning helps"),
    Claim(WINNER, "recommender", "the language model beats the recommender"),
    Claim(WINNER, WITHOUT_TARGETS, "the target contrast helps"),
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
