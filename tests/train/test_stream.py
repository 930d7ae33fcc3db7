"""Batches made by another process are those made in this one, in order, from any step on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from small_tasks import history_task, language_task

from rsllm.data.prepared import PreparedData
from rsllm.errors import DataError
from rsllm.prompts.collate import Batch
from rsllm.train.batches import POOL_STEPS, StepBatches
from rsllm.train.stream import streamed

STEPS = 3 * POOL_STEPS + 5


def parts(value: Any) -> list[Any]:
    """What a batch holds, down to plain lists."""
    if isinstance(value, torch.Tensor):
        return [value.dtype, value.tolist()]
    if dataclasses.is_dataclass(value):
        return [parts(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [value]


@ray.remote(num_cpus=0.5)
def worker_streams(batches: StepBatches, start: int) -> tuple[list[list[Batch]], int, int]:
    """As under Ray Train: a worker starts the stream, with less than a CPU left beside it."""
    found = list(streamed(batches, start, cpus=0.25))
    here = sum(part.encoder.num_dropped_items for part in batches.sets)
    return found, here, batches.num_dropped_items


@pytest.mark.ray
@pytest.mark.parametrize(
    ("start", "rank", "form"),
    [
        (0, 0, "choice"),
        (POOL_STEPS + 3, 1, "choice"),
        (STEPS - 6, 0, "choice"),
        (POOL_STEPS + 3, 1, "history"),
    ],
)
def test_a_stream_is_the_batches_of_its_steps(
    data: PreparedData, random_llm: Path, ray_cluster: str, start: int, rank: int, form: str
) -> None:
    history = form == "history"
    made_of: dict[str, Any] = {"samples": 4 * STEPS, "accumulation": 2}
    task = (
        history_task(data, random_llm, **made_of)
        if history
        else language_task(data, random_llm, curriculum=True, **made_of)
    )
    task.batches.sets[0].encoder.max_tokens = 40 if history else 145
    made = StepBatches(
        task.stage, task.batches.sets, task.batches.text, seed=task.seed, rank=rank, world=2
    )
    found, here, dropped = ray.get(worker_streams.remote(made, start))
    expected = list(made.in_turn(start))
    assert [len(own) for own in found] == [2] * (STEPS - start)
    for own, own_expected in zip(found, expected, strict=True):
        assert [parts(batch) for batch in own] == [parts(batch) for batch in own_expected]
    assert dropped == made.num_dropped_items > 0
    assert here < dropped or STEPS - start <= POOL_STEPS, "the other process made the rest"


@ray.remote(num_cpus=0.5)
def worker_meets(batches: StepBatches) -> tuple[int, str]:
    stream, steps = streamed(batches, 0, cpus=0.25), 0
    try:
        for _ in stream:
            steps += 1
    except DataError as error:
        return steps, str(error)
    return steps, ""


@pytest.mark.ray
def test_an_error_of_the_other_process_is_raised_at_its_step(
    data: PreparedData, random_llm: Path, ray_cluster: str
) -> None:
    class BadRow(StepBatches):
        def __call__(self, step: int) -> list[Batch]:
            if step == STEPS - 1:
                raise DataError("no history item fits")
            return super().__call__(step)

    task = language_task(data, random_llm, samples=4 * STEPS)
    broken = BadRow(task.stage, task.batches.sets, seed=task.seed, rank=0, world=1)
    assert ray.get(worker_meets.remote(broken)) == (STEPS - 1, "no history item fits")
