"""How much faster does RSLLM learn and rank on history prompts than on choice prompts?

Training: steps of the same size (8 prompts) under both forms take turns, from fresh weights, on
MovieLens-100K with the default backbone; what is compared is next items learned from per second.
A choice prompt teaches one. Ranking: the same users by the catalogue scorer, which scores every
item from one pass of a history, and by the likelihood of 20 titles in one pass. Slots hold random
vectors, which cost what others cost. Rates are medians over the rounds, ratios medians over the
rounds' ratios, by the clock and by the processor, which other work on the machine disturbs less.

    python experiments/benchmarks/histories.py --out results.json

Cost: three minutes on two idle cores. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

from rsllm import Experiment, Pipeline
from rsllm.cli import run_script
from rsllm.compute.layout import cpu_has_bf16
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.rank import fixed_sample, score_candidates, score_catalogue
from rsllm.model import tuned
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import provenance, write_json

ROUNDS, STEPS, USERS = 5, 2, 16
CLOCKS = {"second": time.perf_counter, "processor second": time.process_time}
GOALS = {"next items learned from": 15.0, "users ranked": 4.0}
FORMS: dict[str, dict[str, Any]] = {
    "choice": {"stage2.loss.gamma": 3.0, "stage2.loss.scorer": "pointer"},
    "history": {
        "stage2.prompts": "history",
        "stage2.loss.alpha": 0.1,
        "stage2.loss.beta": 0.8,
    },
}


class Learner:
    """A fresh model under one form of prompts, with its engine."""

    def __init__(self, form: str, pipeline: Pipeline, data: PreparedData, autocast: bool) -> None:
        from rsllm.train.engine import Engine
        from rsllm.train.stages import LanguageTask

        experiment = replace_in(pipeline.experiment, FORMS[form])
        titles = ItemEmbeddings.load(pipeline.title_ngrams()).table_IE
        model = tuned.build(
            experiment,
            "unified",
            pipeline.backbone,
            data,
            ItemEmbeddings(torch.randn(len(data.titles), 64), source="random"),
            dtype=torch.float32,
            form=experiment.stage2.prompts,
            titles_IF=titles if form == "history" else None,
        )
        self.encoder = model.encoder
        stage = experiment.stage2
        self.task = LanguageTask(experiment, stage, data, model, name="stage2", autocast=autocast)
        settings = {"zero_stage": 0, "bf16": False}
        self.engine = Engine(self.task.objective, self.task.optimization, **settings)

    def learn(self, steps: range) -> dict[str, float]:
        """Next items and tokens learned from by each clock; batches are made before."""
        batches = [self.task.batches(step) for step in steps]
        targets = sum(getattr(b, "num_targets", 8) for own in batches for b in own)
        tokens = sum(b.num_tokens for own in batches for b in own)
        learn = lambda: [self.engine.step(own, s) for own, s in zip(batches, steps, strict=True)]  # noqa: E731
        return _rates(learn, {"next items": targets, "tokens": tokens})


def _rates(run: Callable[[], Any], amounts: dict[str, int]) -> dict[str, float]:
    """How much of each amount `run` gets done per second of each clock."""
    start = [clock() for clock in CLOCKS.values()]
    run()
    spent = [clock() - at for clock, at in zip(CLOCKS.values(), start, strict=True)]
    seconds = dict(zip(CLOCKS, spent, strict=True))
    return {f"{n}/{c}": size / seconds[c] for n, size in amounts.items() for c in CLOCKS}


def rounds(learners: dict[str, Learner], data: PreparedData, number: int) -> list[dict[str, Any]]:
    """Rates of both forms, a round of steps and users each, in turn; the first round warms up."""
    sample = fixed_sample(data.rows("validation"), USERS * (number + 1))
    found = []
    for at in range(number + 1):
        rows, row = sample.take(slice(at * USERS, (at + 1) * USERS)), dict[str, Any]()
        for form, learner in learners.items():
            rates = learner.learn(range(at * STEPS, (at + 1) * STEPS))
            row |= {f"{form}, {name}": rate for name, rate in rates.items()}
        likely, whole = learners["choice"], learners["history"]
        by_title = partial(score_candidates, likely.engine.objective, rows, likely.encoder, data)
        by_key = partial(score_catalogue, whole.engine.objective, rows, whole.encoder)
        ways = {
            "likelihood of 20": partial(by_title, "likelihood", batch_size=8),
            "whole catalogue": partial(by_key, batch_size=8),
        }
        for name, rank in ways.items():
            rates = _rates(rank, {"users": len(rows)})
            row |= {f"{name}, {unit}": rate for unit, rate in rates.items()}
        found.append(row)
    return found[1:]


def main() -> None:
    """Measure; print and write rates and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    store = f"file://{tempfile.mkdtemp()}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    pipeline = Pipeline(Experiment(), arguments.storage)
    data = PreparedData.open(pipeline.prepare())
    learners = {form: Learner(form, pipeline, data, cpu_has_bf16()) for form in FORMS}
    found = rounds(learners, data, arguments.rounds)
    pairs = {
        "next items learned from": ("history, next items", "choice, next items"),
        "users ranked": ("whole catalogue, users", "likelihood of 20, users"),
    }
    table = [
        {
            "what": name,
            "per": clock,
            "histories": statistics.median(row[f"{one}/{clock}"] for row in found),
            "choices": statistics.median(row[f"{other}/{clock}"] for row in found),
            "ratio": statistics.median(
                row[f"{one}/{clock}"] / row[f"{other}/{clock}"] for row in found
            ),
            "goal": GOALS[name],
        }
        for name, (one, other) in pairs.items()
        for clock in CLOCKS
    ]
    facts = {"rates per second": table, "rounds": found, "users_per_round": USERS}
    facts |= {"steps_per_round": STEPS, "threads": torch.get_num_threads()}
    facts |= {"bf16": cpu_has_bf16(), "backbone": Experiment().backbone.source}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, facts | {"provenance": provenance()})
    print(tabulate(table, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    run_script(main)
