"""A world of real processes that talk over gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)


def run_in_world(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What `fn(*args)` returns on each rank, in rank order.

    Every rank is a spawned process with one thread, inside an initialised process group. `fn`
    must be importable by name; tensors it returns must be detached.

    Raises:
        ExceptionGroup: the errors of all ranks that failed; one failure usually fails its peers.
    """
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(world_size, mp_context=context) as pool,
    ):
        ranks = [
            pool.submit(_join_and_run, fn, rank, world_size, f"file://{folder}/store", args)
            for rank in range(world_size)
        ]
        errors = [error for rank in ranks if isinstance(error := rank.exception(), Exception)]
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {world_size} ranks failed", errors)
        return [rank.result() for rank in ranks]


def _join_and_run(
    fn: Callable[..., Any], rank: int, world_size: int, store: str, args: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        return fn(*args)
    finally:
        dist.destroy_process_group()
