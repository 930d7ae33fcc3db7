"""Which width, depth, dropout, learning rate and L2 does a traditional recommender need?

Published baselines of LLM recommendation are often untuned, and a language model that beats them
shows little. Searches one recommender's settings for validation MRR, as an exact expectation over
candidate draws; the test split stays closed. Every trial runs on one core.

    python experiments/tune_recommender.py --recommender sasrec
    python experiments/tune_recommender.py --recommender caser --data llara-lastfm \
        --set data.split=given

Cost: see `--help`. Chosen settings: rsllm/config/presets.toml, with the result of each.
"""

from __future__ import annotations

from typing import Any

import optuna
from tabulate import tabulate

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.pipeline import Pipeline
from rsllm.runs import provenance
from rsllm.settings import replace_in
from rsllm.tune.arguments import Budget, parse
from rsllm.tune.progress import shown
from rsllm.tune.search import Search

BASE = replace_in(Experiment(), {"compute.threads": 1})

BUDGETS = {
    "quick": Budget(
        summary="10 trials of at most 12 epochs",
        trials=10,
        overrides={"recommender.max_epochs": 12.0},
    ),
    "full": Budget(
        summary="60 trials of at most 40 epochs",
        trials=60,
        overrides={"recommender.max_epochs": 40.0, "recommender.patience": 5},
    ),
}

FIRST_GUESSES = [
    {"width": 64, "depth": 1, "dropout": 0.2, "rate": 2e-3, "l2": 1e-3},
    {"width": 64, "depth": 2, "dropout": 0.4, "rate": 1e-3, "l2": 1e-2},
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
    """Search, print the trials, write what was found."""
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
    ranked = sorted(records, key=lambda record: record.score or 0.0, reverse=True)
    table = [
        {"MRR": r.score, "HR@1": max(e["HR@1"] for e in r.curve), "state": r.state}
        | shown(r.overrides)
        for r in ranked
        if r.curve
    ]
    print(tabulate(table, headers="keys", floatfmt=".3g"))
    results = {
        "data": experiment.data.source,
        "model": experiment.recommender.model,
        "best": ranked[0].overrides,
        "trials": [
            {"number": r.number, "state": r.state, "overrides": r.overrides, "curve": r.curve}
            for r in ranked
        ],
        "provenance": provenance(),
    }
    search.publish(results)


if __name__ == "__main__":
    run_script(main)
