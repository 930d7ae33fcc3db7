"""How long does a search take, and what do the shared store and early stopping save of it?

The same search of loss weights and a learning rate on MovieLens-100K three times: as users run it,
without early stopping, and with a store of its own for every trial, so that nothing is shared.

    python experiments/benchmarks/search.py --out results.json

Cost: 55 min on 2 cores. Last measured: experiments/results/benchmarks/search-2-cores.json: 1.79
times as long without a shared store, for the same trials, and 1.34 times without early stopping.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import optuna
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from tabulate import tabulate

from rsllm import Experiment, Pipeline, replace_in
from rsllm.cli import run_script
from rsllm.compute.start import start_ray
from rsllm.store.artifacts import provenance, write_json
from rsllm.study import search
from rsllm.study.search import Search

TRIALS = 12
SETTINGS = {
    "stage2.loss.scorer": "pointer",
    "data.num_candidates": 10,
    "stage1.samples": 32,
    "stage2.samples": 96,
    "stage2.validations": 4,
    "evaluation.validation_rows": 24,
}
shared_trial = search._trial


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Weights of the ranking loss and of a contrast, and a learning rate."""
    return {
        "stage2.loss.gamma": trial.suggest_float("gamma", 0.3, 10.0, log=True),
        "stage2.lora_learning_rate": trial.suggest_float("rate", 1e-4, 2e-3, log=True),
        "stage2.loss.alpha": trial.suggest_float("alpha", 0.0, 0.5),
    }


class NeverStopped(Search):
    """Every trial goes on to its end."""

    def _scheduler(self) -> TrialScheduler:
        return FIFOScheduler()


def trial_alone(config: dict[str, Any], storage: str, **more: Any) -> None:
    """A trial that finds nothing of the others, and leaves them only what the search reads."""
    results, own = Path(storage, "stage-2"), Path(storage, "alone", str(config["number"]))
    for folder in (results, own):
        folder.mkdir(parents=True, exist_ok=True)
    (own / results.name).symlink_to(results.resolve())
    shared_trial(config, storage=str(own), **more)


def run_once(kind: type[Search], storage: Path) -> dict[str, Any]:
    """One search in an empty store: seconds from its start to its end, and its trials."""
    pipeline = Pipeline(replace_in(Experiment(), SETTINGS), storage)
    begun = time.monotonic()
    made = kind(pipeline=pipeline, space=space, name="search")
    records = made.run(TRIALS)
    scores = [max((entry["score"] for entry in record.curve), default=0.0) for record in records]
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "best": max(scores),
        "scores": scores,
        "samples": [record.curve[-1]["samples"] if record.curve else 0 for record in records],
        "states": [record.state for record in records],
        "overrides": [record.overrides for record in records],
    }


def main() -> None:
    """Run the three; print and write what each took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default="rsllm-store/search", metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    start_ray()
    found = {"as users run it": run_once(Search, arguments.storage / "usual")}
    found["without early stopping"] = run_once(NeverStopped, arguments.storage / "unstopped")
    search._trial = trial_alone
    found["without a shared store"] = run_once(Search, arguments.storage / "unshared")
    usual = found["as users run it"]["seconds"]
    for one in found.values():
        one["ratio"] = round(one["seconds"] / usual, 2)
    rows = [(name, one["seconds"], one["ratio"], one["best"]) for name, one in found.items()]
    print(tabulate(rows, ["search", "seconds", "ratio", "best score"], floatfmt=".3f"))
    made = {"trials": TRIALS, "settings": SETTINGS, "searches": found, "provenance": provenance()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, made)


if __name__ == "__main__":
    run_script(main)
