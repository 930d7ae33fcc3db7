"""What does the train loop cost a traditional recommender, against a plain PyTorch loop?

The reference trains the same model on the same rows with the same optimizer in a dozen lines:
tensors in memory, a shuffled index, AdamW. Both run in turn in one process, a round of steps each,
without validation; rates are medians over the rounds.

    python experiments/benchmarks/recommender.py --out results.json

Cost: two minutes on one core. Start-up (about 10 s with Ray Train) is left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

from rsllm import Experiment, Pipeline, replace_in
from rsllm.cli import run_script
from rsllm.config.models import RECOMMENDERS
from rsllm.config.presets import preset
from rsllm.data.prepared import PreparedData
from rsllm.recommenders import build
from rsllm.store.artifacts import provenance, write_json

ROUNDS, STEPS, WARM_UP = 9, 30, 10


def ours(experiment: Experiment, data: PreparedData) -> Iterator[None]:
    """One step of the train loop at a time."""
    from rsllm.train.engine import Engine
    from rsllm.train.recommender import RecommenderTask

    task = RecommenderTask(experiment, data)
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    for step in range(WARM_UP + ROUNDS * STEPS):
        engine.step(task.batches(step), step)
        yield


def plain(experiment: Experiment, data: PreparedData) -> Iterator[None]:
    """One step of the obvious loop at a time."""
    config, rows = experiment.recommender, data.rows("train")
    arrays = (rows.history_RH, rows.length_R, rows.target_R)
    history, length, target = (torch.from_numpy(array).long() for array in arrays)
    model = build(config, len(data.titles), experiment.data.window)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    while True:
        for chosen in torch.randperm(len(target)).split(config.batch_size):
            scores = model.scores(model(history[chosen], length[chosen]))
            loss = torch.nn.functional.cross_entropy(scores, target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def rates(experiment: Experiment, data: PreparedData) -> dict[str, Any]:
    """Median rows per second of both, and the median ratio of neighbouring rounds."""
    loops = {"rsllm": ours(experiment, data), "plain": plain(experiment, data)}
    for loop in loops.values():
        _advance(loop, WARM_UP)
    size = STEPS * experiment.recommender.batch_size
    rounds = [
        {
            name: size / timeit(lambda loop=loop: _advance(loop, STEPS), number=1)
            for name, loop in loops.items()
        }
        for _ in range(ROUNDS)
    ]
    return {
        "model": experiment.recommender.model,
        "rsllm": statistics.median(r["rsllm"] for r in rounds),
        "plain": statistics.median(r["plain"] for r in rounds),
        "ratio": statistics.median(r["rsllm"] / r["plain"] for r in rounds),
    }


def _advance(loop: Iterator[None], steps: int) -> None:
    for _ in range(steps):
        next(loop)


def main() -> None:
    """Measure each recommender; print and write the rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = PreparedData.open(Pipeline(Experiment(), arguments.storage).prepare())
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        found = [
            rates(replace_in(Experiment(), preset(model, "movielens-100k")), data)
            for model in RECOMMENDERS
        ]
        dist.destroy_process_group()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out,
        {"rows_per_second": found, "rounds": ROUNDS, "steps": STEPS, "provenance": provenance()},
    )
    print(tabulate(found, headers="keys", floatfmt=(".0f", ".0f", ".0f", ".2f")))


if __name__ == "__main__":
    run_script(main)
