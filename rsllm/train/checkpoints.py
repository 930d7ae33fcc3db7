"""Checkpoints of one run: committed whole, verified before any rank loads, pruned."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rsllm.errors import CheckpointError
from rsllm.runs import manifest, seal
from rsllm.train.engine import Engine


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands; what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    """Training and validation time so far, over all attempts."""
    best_step: int = 0
    best_score: float = float("-inf")
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per validation."""

    def validated(self, report: dict[str, float], metric: str, *, keeps_best: bool) -> State:
        """The state after a validation.

        Its entry in the curve says how many there were, and the score that the run would end with
        now: the best one so far, if it goes back to that.
        """
        best = max(report[metric], self.best_score)
        score = best if keeps_best else report[metric]
        entry = report | {"validations": len(self.curve) + 1.0, "score": score}
        state = replace(self, curve=[*self.curve, entry])
        if report[metric] > self.best_score:
            return replace(state, best_step=self.step, best_score=best)
        return state

    def validations_since_best(self) -> int:
        """Validations after the best one."""
        return sum(entry["step"] > self.best_step for entry in self.curve)


class Checkpoints:
    """The checkpoints in one folder that all workers see. Every rank must call each method."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self, engine: Engine, state: State) -> None:
        """Save everything at this step, then prune."""
        final = self._path(state.step)
        staging = self.folder / f".{final.name}.staging"
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        engine.save(staging)
        dist.barrier()
        if dist.get_rank() == 0:
            seal(staging, {"state": asdict(state), "workers": dist.get_world_size()})
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._prune(state.best_step)
        dist.barrier()

    def restore(self, engine: Engine, step: int | None = None) -> State:
        """Load the newest valid checkpoint (or the one of `step`); step 0 if there is none.

        Raises:
            CheckpointError: the checkpoint asked for is damaged, or is of another world size.
        """
        agreed: list[Any] = [self._choose(step) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(agreed)
        (choice,) = agreed
        if choice is None:
            return State()
        state: State
        state, workers = choice
        if workers != dist.get_world_size():
            raise CheckpointError(
                f"{self.folder} was written by {workers} workers and this run has"
                f" {dist.get_world_size()}; use compute.workers={workers} or delete it"
            )
        engine.load(self._path(state.step))
        return state

    def _choose(self, step: int | None) -> tuple[State, int] | None:
        paths = [self._path(step)] if step is not None else sorted(self.folder.glob("step-*"))[::-1]
        for path in paths:
            try:
                facts = manifest(path, verify=True)
                return State(**facts["state"]), facts["workers"]
            except CheckpointError as error:
                if step is not None:
                    raise
                print(f"rsllm: skipping {path.name}: {error}", flush=True)
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _prune(self, best_step: int) -> None:
        """Keep the best and the newest two, should the newest turn out damaged."""
        for path in sorted(self.folder.glob("step-*"))[:-2]:
            if path != self._path(best_step):
                shutil.rmtree(path, ignore_errors=True)
