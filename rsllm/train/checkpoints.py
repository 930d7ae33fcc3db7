"""Checkpoints of one run: committed whole, verified before any rank loads, pruned."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rsllm.errors import CheckpointError
from rsllm.store.artifacts import Mirror, manifest, seal
from rsllm.train.engine import Engine

PART_BYTES = 2**30
"""Size from which tensors go into a file of a checkpoint: what rank 0 holds of them at a time."""
MAX_FAILED_COMMITS = 3
"""In a row; training goes on after fewer, for disks may be emptied."""


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands; what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    """Training and validation time so far, over all attempts."""
    best_step: int = 0
    best_score: float = -1.0
    """The best score of all validations; metrics are not negative."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per validation."""

    def validated(self, report: dict[str, float], metric: str, *, keeps_best: bool) -> State:
        """The state after a validation.

        Its entry in the curve says how many there were, and the score that the run would end with
        now: the best one so far, if it goes back to that.
        """
        best = max(self.best_score, report[metric])  # also where the report is not a number
        score = best if keeps_best else report[metric]
        entry = report | {"validations": len(self.curve) + 1.0, "score": score}
        best_step = self.step if report[metric] > self.best_score else self.best_step
        curve = [*self.curve, entry]
        return replace(self, best_step=best_step, best_score=best, curve=curve)

    def validations_since_best(self) -> int:
        """Validations after the best one."""
        return sum(entry["step"] > self.best_step for entry in self.curve)


class Checkpoints:
    """The checkpoints at one location, as all workers see it. Every rank must call each method.

    A checkpoint is a folder with safetensors of whole weights and moments, and a manifest; it is
    staged, flushed and renamed in, or uploaded where the location is a URI. No file says which is
    the newest: they are looked at.
    """

    def __init__(self, location: str | Path) -> None:
        self.mirror = Mirror(str(location))
        self.folder = self.mirror.root
        self.failures = 0

    def commit(self, engine: Engine, state: State) -> None:
        """Save everything at this step, then prune.

        A full disk or a URI that cannot be reached costs this checkpoint only.

        Raises:
            CheckpointError: it failed for the third time in a row.
        """
        staging, problem = self.folder / f".{_name(state.step)}.staging", ""
        for number, part in enumerate(_parts(engine.state())):
            if dist.get_rank() == 0 and not problem:
                problem = self._attempt(partial(_write, part, staging, number), staging)
        if dist.get_rank() == 0 and not problem:
            problem = self._attempt(partial(self._finish, staging, state), staging)
        problem = _from_rank_0(problem)
        self.failures = self.failures + 1 if problem else 0
        if self.failures == MAX_FAILED_COMMITS:
            raise CheckpointError(f"{self.failures} checkpoints in a row failed: {problem}")

    def _attempt(self, write: Callable[[], None], staging: Path) -> str:
        """Write, and return what went wrong, if anything did; nothing half-written stays then."""
        try:
            write()
        except (OSError, SafetensorError, CheckpointError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free / 1e6
            problem = f"{staging} could not be written ({error}; {free:.0f} MB free)"
            print(f"rsllm: {problem}; training goes on without this checkpoint", flush=True)
            return problem
        return ""

    def _finish(self, staging: Path, state: State) -> None:
        final = self.folder / _name(state.step)
        seal(staging, {"state": asdict(state)})
        self.mirror.upload(final.name, staging)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        if self.mirror.remote:  # nodes that train for long must not fill up
            shutil.rmtree(final)
        self._prune(state.best_step)

    def restore(self, engine: Engine, step: int | None = None) -> State:
        """Load the newest valid checkpoint (or the one of `step`); step 0 if there is none.

        Raises:
            CheckpointError: the checkpoint asked for is damaged, or all are.
        """
        state: State | CheckpointError | None = None
        if dist.get_rank() == 0:
            try:
                state = self._choose(step)
            except CheckpointError as error:
                state = error
        state = _from_rank_0(state)
        if isinstance(state, CheckpointError):
            raise state
        if state is None:
            return State()
        self.mirror.fetch(_name(state.step))
        with contextlib.ExitStack() as stack:
            where: dict[str, Any] = {}
            for path in sorted((self.folder / _name(state.step)).glob("*.safetensors")):
                file = stack.enter_context(safe_open(path, "pt"))
                where |= dict.fromkeys(file.keys(), file)
            engine.load_state(lambda name: where[name].get_tensor(name), state.step)
        return state

    def _choose(self, step: int | None) -> State | None:
        for left in self.folder.glob(".step-*.staging"):
            shutil.rmtree(left, ignore_errors=True)
        names = [_name(step)] if step is not None else self.mirror.names()[::-1]
        for name in names:
            try:
                self.mirror.fetch(name)
                return State(**manifest(self.folder / name, verify=True)["state"])
            except CheckpointError as error:
                if step is not None:
                    raise
                print(f"rsllm: skipping {name}: {error}", flush=True)
        if names:
            raise CheckpointError(
                f"no checkpoint in {self.mirror.location} is whole; delete the folder to start over"
            )
        return None

    def _prune(self, best_step: int) -> None:
        """Keep the best and the newest two that are whole, should the newest turn out damaged."""
        for name in list(filter(self._is_whole, self.mirror.names()))[:-2]:
            if name != _name(best_step):
                self.mirror.remove(name)

    def _is_whole(self, name: str) -> bool:
        with contextlib.suppress(CheckpointError):
            return bool(self.mirror.remote or manifest(self.folder / name))
        return False


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors, as many at a time as a file holds."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        part[name] = tensor.contiguous()
        size += tensor.nbytes
        if size >= PART_BYTES:
            yield part
            part, size = {}, 0
    yield part


def _write(part: dict[str, Tensor], folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(part, folder / f"state-{number:05d}.safetensors")


def _from_rank_0(value: Any) -> Any:
    agreed = [value]
    dist.broadcast_object_list(agreed)
    return agreed[0]
