"""Worlds in which engines and tasks run: of real processes over gloo, and of this one alone."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)
_worlds: dict[int, list[ProcessPoolExecutor]] = {}
"""By size, a process for each rank. They stay: to start one takes longer than most tests in it."""
_meeting_places = tempfile.TemporaryDirectory()


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """This process as the one rank of a process group, which meets in `folder`; once is enough."""
    if dist.is_initialized():
        yield
        return
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    # Compiling the op for shared memory takes a minute, and whoever is killed meanwhile leaves a
    # lock for which all others wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it; Ray Train sets it
        yield
    deepspeed.comm.destroy_process_group()  # and its own groups, which the next world lacks


def run_in_world(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What `fn(*args)` returns on each rank, in rank order.

    Every rank is a spawned process with one thread, inside an initialised process group. `fn`
    must be importable by name; tensors it returns must be detached.

    Raises:
        ExceptionGroup: the errors of all ranks that failed; one failure usually fails its peers.
    """
    if world_size not in _worlds:
        _worlds[world_size] = _world(world_size)
    ranks = {process.submit(fn, *args): process for process in _worlds[world_size]}
    for rank in as_completed(ranks):
        if rank.exception():
            ranks[rank].shutdown(wait=False)  # it ends, so that its peers do not wait for it
            _worlds.pop(world_size, None)
    errors = [error for rank in ranks if isinstance(error := rank.exception(), Exception)]
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {world_size} ranks failed", errors)
    return [rank.result() for rank in ranks]


def _world(size: int) -> list[ProcessPoolExecutor]:
    store = f"file://{_meeting_places.name}/{secrets.token_hex(8)}"
    spawn = multiprocessing.get_context("spawn")
    return [
        ProcessPoolExecutor(1, spawn, initializer=_join, initargs=(rank, size, store))
        for rank in range(size)
    ]


def _join(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
