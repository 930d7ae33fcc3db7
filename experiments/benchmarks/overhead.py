"""What do Ray Train, Ray Data and checkpoints cost, against a bare loop around the same engine?

The bare loop runs in a process of its own, without Ray: the same task on the same rows, batches
made between the steps, one line per step. Against it stands the stage as a user runs it: a worker
of Ray Train, batches through Ray Data, TensorBoard, metrics, and a checkpoint a minute. Both take
turns; a step is compared with the same step, and ratios are medians over steps.

    python experiments/benchmarks/overhead.py --out results.json

Cost: about 12 min on 2 cores. Last measured: experiments/results/benchmarks/overhead-2-cores.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from tabulate import tabulate

from rsllm import Experiment, Pipeline, replace_in
from rsllm.cli import run_script
from rsllm.compute.start import start_ray
from rsllm.store.artifacts import provenance, read_json, write_json
from rsllm.train.assignment import Assignment
from rsllm.train.worker import build_task

ROUNDS, STEPS, WARM_UP = 2, 40, 3
SHORT = {
    "stage1.samples": 0,
    "stage2.batch_size": 4,
    "stage2.samples": 4 * STEPS,
    "stage2.validations": 1,
    "evaluation.validation_rows": 4,
}


def pipeline_at(storage: str) -> Pipeline:
    """Stage 2 of the default experiment, on its real data and recommender."""
    return Pipeline(replace_in(Experiment(), SHORT), storage)


def under_ray(storage: str) -> dict[str, Any]:
    """Train as a user's run does: when each step ended, and the run's own account of its time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start_ray()
    pipeline = pipeline_at(storage)
    store = pipeline.store
    if earlier := pipeline.finished():
        store.remove(store.name(earlier))
        store.remove(f"tensorboard/stage-2-{earlier.name}")
    artifact = pipeline.train()
    events = EventAccumulator(str(store.root / "tensorboard" / f"stage-2-{artifact.name}"))
    events.Reload()
    ends: dict[int, float] = {}
    for event in events.Scalars("loss"):  # the last step's stands there again, once validated
        ends.setdefault(event.step, event.wall_time)
    return {"ends": [*ends.values()], **read_json(artifact / "training.json")["curve"][-1]}


def bare(storage: str) -> dict[str, Any]:
    """Train the same in a plain loop around the engine: when each step ended."""
    import torch
    import torch.distributed as dist

    from rsllm.train.engine import Engine

    pipeline = pipeline_at(storage)
    assignment = Assignment(
        stage="stage2",
        experiment=pipeline.experiment,
        layout=pipeline.layout,
        store=pipeline.store,
        inputs={},
        data=str(pipeline.prepare()),
        backbone=pipeline.backbone,
        recommender=str(pipeline.fit()),
    )
    ray.shutdown()
    torch.set_num_threads(assignment.layout.threads)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        task = build_task(assignment)
        zero_stage = assignment.experiment.compute.zero_stage
        engine = Engine(task.objective, task.optimization, zero_stage=zero_stage, bf16=False)
        ends = []
        for step in range(STEPS):
            engine.step(task.batches(step), step)
            ends.append(time.time())
        dist.destroy_process_group()
    return {"ends": ends}


SIDES = {"bare": bare, "ray": under_ray}


def measured(side: str, storage: str) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each step of one side, in a process of its own, and what else it says."""
    command = [sys.executable, __file__, "--side", side, "--storage", storage, "--out", os.devnull]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    account = json.loads(done.stdout.splitlines()[-1])
    steps = [end - start for start, end in pairwise(account.pop("ends"))]
    return steps[WARM_UP:], account


def main() -> None:
    """Let both take turns; print and write what a step costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", default="rsllm-store", metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.storage)))
        return
    start_ray()
    pipeline_at(arguments.storage).fit()
    ray.shutdown()
    ratios: list[float] = []
    accounts, medians = list[dict[str, float]](), list[dict[str, float]]()
    for _ in range(ROUNDS):
        plain, _ = measured("bare", arguments.storage)
        ours, account = measured("ray", arguments.storage)
        ratios += [mine / other for mine, other in zip(ours, plain, strict=True)]
        medians.append({"rsllm": statistics.median(ours), "bare": statistics.median(plain)})
        accounts.append(account)
    shares = ("checkpoint_share", "data_wait_share")
    found: dict[str, Any] = {
        "step_seconds": medians,
        "step_ratio": statistics.median(ratios),
        **{name: statistics.mean(account[name] for account in accounts) for name in shares},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out, {**found, "rounds": ROUNDS, "steps": STEPS, "provenance": provenance()}
    )
    print(tabulate([(name, found[name]) for name in ("step_ratio", *shares)], floatfmt=".3f"))


if __name__ == "__main__":
    run_script(main)
