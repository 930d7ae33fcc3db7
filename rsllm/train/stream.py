"""Batches through Ray Data: another process encodes them while the last steps train."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, cast

import numpy as np
import ray
from ray.data import ExecutionResources, TaskPoolStrategy

from rsllm.compute.start import quiet_ray_data
from rsllm.errors import RsllmError
from rsllm.prompts.collate import Batch
from rsllm.prompts.histories import HistoryBatch
from rsllm.train.batches import POOL_STEPS, StepBatches

_fetched = lru_cache(maxsize=2)(ray.get)
READY_BYTES = 2**28
"""Of encoded batches that wait in the object store, per worker."""


def streamed(
    batches: StepBatches, start: int, *, cpus: float
) -> Iterator[list[Batch | HistoryBatch]]:
    """The batches of a step and of all after it, made ahead by another process with `cpus`.

    Each worker streams its own share of every step, so the order is that of the steps whatever
    the number of workers, and none waits for another. While that process starts, the first steps'
    batches are made in this one.
    """
    later = min(start + POOL_STEPS, batches.stage.steps)
    steps = range(later, batches.stage.steps)
    with ThreadPoolExecutor(1) as thread:
        rows = _rows(batches, steps, cpus) if steps else iter(())
        first = thread.submit(next, rows, None)
        yield from map(batches, range(start, later))
        row = first.result()
        while row is not None:
            batches.num_dropped_elsewhere += int(row["dropped"])
            if isinstance(row["batches"], RsllmError):
                raise row["batches"]
            yield row["batches"]
            row = next(rows, None)


def _rows(batches: StepBatches, steps: Sequence[int], cpus: float) -> Iterator[dict[str, Any]]:
    options = quiet_ray_data(logging.ERROR).execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=READY_BYTES)
    blocks = -(-len(steps) // POOL_STEPS)
    encoded = ray.data.from_items(list(steps), override_num_blocks=blocks).map_batches(
        _encode,
        # In a list, for Ray Data would put what it refers to before every task.
        fn_args=([ray.put(batches)],),
        batch_size=None,
        num_cpus=cpus,
        compute=TaskPoolStrategy(size=1),
    )
    return cast(Iterator[dict[str, Any]], iter(encoded.iter_rows()))


def _encode(block: dict[str, Any], reference: list[Any]) -> dict[str, Any]:
    """Turn a block of step numbers into their batches, in the other process."""
    quiet_ray_data(logging.ERROR)
    batches: StepBatches = _fetched(reference[0])
    encoded = np.empty(len(block["item"]), object)
    dropped = np.zeros(len(encoded), np.int64)
    for row, step in enumerate(block["item"]):
        before = batches.num_dropped_items
        try:
            encoded[row] = batches(int(step))
        except RsllmError as error:  # Ray Data would pass on its text only
            encoded[row] = error
        dropped[row] = batches.num_dropped_items - before
    return {"batches": encoded, "dropped": dropped}
