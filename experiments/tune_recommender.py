"""Which width, depth, dropout, learning rate and L2 does a traditional recommender need?

Published baselines of LLM recommendation are often untuned, and a language model that beats them
shows little. Searches one recommender's settings for validation MRR, as an exact expectation over
candidate draws, and trains the best trials anew on fresh seeds, of which the best mean wins; the
test split stays closed. Every trial runs on one core.

    python experiments/tune_recommender.py --recommender sasrec
    python experiments/tune_recommender.py --recommender caser --data llara-lastfm \
        --set data.split=given

Cost: see `--help`. Chosen settings: rsllm/config/presets.toml, with the result of each.
"""

from __future__ import annotations

from typing import Any

import optuna

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.flags import Budget, parse
from rsllm.pipeline import Pipeline
from rsllm.study.search import Search, publish
from rsllm.study.variants import confirm_best

BASE = replace_in(Experiment(), {"compute.threads": 1})

BUDGETS = {
    "short": Budget(
        summary="4 trials of at most 12 epochs, the best on 1 fresh seed: for large data",
        trials=4,
        confirm_top=1,
        seeds=1,
        overrides={"recommender.max_epochs": 12.0},
    ),
    "quick": Budget(
        summary="10 trials of at most 12 epochs, the best 3 on 3 fresh seeds",
        trials=10,
        confirm_top=3,
        seeds=3,
        overrides={"recommender.max_epochs": 12.0},
    ),
    "full": Budget(
        summary="60 trials of at most 40 epochs, the best 5 on 5 fresh seeds",
        trials=60,
        confirm_top=5,
        seeds=5,
        overrides={"recommender.max_epochs": 40.0, "recommender.patience": 5},
    ),
}

FRESH = 1000
"""The first of the seeds that the search does not use."""
FIRST_GUESSES = [
    {"width": 64, "depth": 1, "dropout": 0.2, "rate": 2e-3, "l2": 1e-3},
    {"width": 64, "depth": 2, "dropout": 0.4, "rate": 1e-3, "l2": 1e-2},
    {"width": 64, "depth": 1, "dropout": 0.3, "rate": 2.4e-3, "l2": 1e-1},
]


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Depth is SASRec's blocks and GRU4Rec's layers, and 16 filters of each height for Caser."""
    depth = trial.suggest_int("depth", 1, 3)
    return {
        "recommender.width": trial.suggest_categorical("width", [32, 64, 128]),
        "recommender.num_blocks": depth,
        "recommender.num_filters": 16 * depth,
        "recommender.dropout": trial.suggest_float("dropout", 0.0, 0.6),
        "recommender.learning_rate": trial.suggest_float("rate", 3e-4, 1e-2, log=True),
        "recommender.weight_decay": trial.suggest_float("l2", 1e-5, 1e-1, log=True),
    }


def main() -> None:
    """Search, try the best on fresh seeds, and report what was found."""
    arguments = parse(__doc__ or "", BUDGETS, BASE, watched="recommender")
    print(f"budget {arguments.budget_name}: {arguments.budget.summary}", flush=True)
    experiment = arguments.experiment
    search = Search(
        pipeline=Pipeline(experiment, arguments.storage, watched="recommender"),
        space=space,
        name=arguments.named("tune-recommender"),
        first_guesses=FIRST_GUESSES,
        seed=arguments.seed,
        **arguments.search,
    )
    records = search.run(arguments.trials)
    fresh, top = range(FRESH, FRESH + arguments.seeds), arguments.budget.confirm_top
    confirm, ranked = confirm_best(
        records, top, experiment, fresh, arguments.storage, "recommender"
    )
    best = next(iter(ranked.values()))
    settings = replace_in(experiment, best.overrides)
    chosen = Pipeline(settings, arguments.storage, watched="recommender")
    publish(
        search.pipeline,
        search.name,
        records,
        best,
        model=chosen.finished(),
        title=f"Tune {experiment.recommender.model}",
        question="Which width, depth, dropout, learning rate and L2 does it need?",
        confirm=confirm,
        seeds=list(fresh),
    )


if __name__ == "__main__":
    run_script(main)
