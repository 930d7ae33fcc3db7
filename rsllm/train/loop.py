"""The train loop: one screen, for the recommender and both language-model stages."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsllm.terminal import LIVE
from rsllm.train.checkpoints import Checkpoints, State
from rsllm.train.engine import Engine, Optimization
from rsllm.train.watch import Watch

Report = Callable[[dict[str, float]], None]
Log = Callable[[int, dict[str, float]], None]
PROGRESS_SECONDS = 30.0


class Task(Protocol):
    """A stage as the loop sees it: what trains, on what, and how it is judged."""

    name: str
    seed: int
    steps: int
    rows_per_step: int
    patience: int
    """Validations without a better score before it stops; 0 trains to the end."""
    metric: str
    objective: nn.Module
    optimization: Optimization

    def feed(self, start: int) -> Iterator[Sequence[Any]]:
        """This worker's micro-batches of a step and of all after it: pure functions of the step."""

    def due(self, step: int) -> bool:
        """Whether to validate after this many steps."""

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Validation metrics, equal on all ranks."""

    def export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write the finished artifact (rank 0 only)."""


def train(
    task: Task,
    engine: Engine,
    checkpoints: Checkpoints,
    watch: Watch,
    report: Report,
    log: Log,
) -> State:
    """Train to the end, or until validation stops improving; continue if there is a checkpoint.

    Args:
        watch: says when to save beside the validations, and when to leave.
        report: takes every validation's entry of the learning curve.
        log: takes what each step and validation measured, beside the step.

    Raises:
        Interrupted: told to leave; everything up to this step is saved.
    """
    state = checkpoints.restore(engine)
    progress, feed = Progress(task, state), task.feed(state.step)
    while state.step < task.steps:
        if task.patience and state.validations_since_best() >= task.patience:
            break
        # Dropout is a function of seed, rank and step, so that resuming needs no state of it.
        torch.manual_seed((task.seed * 1_000_003 + state.step) * 1009 + dist.get_rank())
        with progress.waits():
            batches = next(feed)
        losses = engine.step(batches, state.step)
        progress.tokens += sum(batch.num_tokens for batch in batches)
        state = replace(state, step=state.step + 1)
        progress.show(state, losses)
        log(state.step, losses)
        validates = task.due(state.step) or state.step == task.steps
        if validates:
            state = replace(state, seconds=progress.seconds())
            entry = losses | task.validate(engine.objective) | progress.peak()
            entry |= progress.rates(state, watch.spent)
            state = state.validated(entry, task.metric, keeps_best=task.patience > 0)
            log(state.step, state.curve[-1])
        if watch.checkpoint_due(engine) or validates:
            with watch.saving():
                checkpoints.commit(engine, replace(state, seconds=progress.seconds()))
        if validates:
            report(state.curve[-1])
        watch.raise_if_preempted()
    watch.stop()
    if task.patience and state.step != state.best_step:
        checkpoints.restore(engine, step=state.best_step)
    return replace(state, seconds=progress.seconds())


class Progress:
    """Keeps count of rows, tokens and time; rank 0 prints how long training still takes."""

    def __init__(self, task: Task, state: State) -> None:
        self.task, self.first = task, state
        self.start = self.last = time.monotonic()
        self.waited, self.tokens = 0.0, 0
        self.losses: list[float] = []

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Count the time that the block takes as waiting for data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def seconds(self) -> float:
        """Time spent on this run so far, in seconds, over all attempts."""
        return self.first.seconds + time.monotonic() - self.start

    def peak(self) -> dict[str, float]:
        """The highest loss of a step since the last validation (or restart), over their median."""
        losses, self.losses = self.losses, []
        return {"health/loss_peak": max(losses) / (median(losses) or 1.0)}

    def rates(self, state: State, checkpoint_seconds: float) -> dict[str, float]:
        """Step, rows, speed and where time goes; tokens are rank 0's times the workers."""
        rows = (state.step - self.first.step) * self.task.rows_per_step
        seconds = max(1e-9, time.monotonic() - self.start)
        return {
            "step": float(state.step),
            "samples": float(state.step * self.task.rows_per_step),
            "seconds": state.seconds,
            "device_seconds": state.seconds * dist.get_world_size(),
            "samples_per_second": rows / seconds,
            "tokens_per_second": self.tokens * dist.get_world_size() / seconds,
            "data_wait_share": self.waited / seconds,
            "checkpoint_share": checkpoint_seconds / seconds,
        }

    def show(self, state: State, losses: dict[str, float]) -> None:
        """Note the step's loss; where there is no bar, print a line if the last was long ago."""
        self.losses.append(losses["loss"])
        now = time.monotonic()
        if dist.get_rank() or os.environ.get(LIVE) or now - self.last < PROGRESS_SECONDS:
            return
        self.last = now
        rates = self.rates(state, 0.0)
        rows_left = (self.task.steps - state.step) * self.task.rows_per_step
        print(
            f"{self.task.name}: step {state.step}/{self.task.steps}, loss {losses['loss']:.3f}, "
            f"{rates['samples_per_second']:.1f} rows/s, {rates['tokens_per_second']:.0f} tokens/s, "
            f"{rates['data_wait_share']:.1%} waiting for data, "
            f"at most {rows_left / rates['samples_per_second'] / 60:.1f} min left",
            flush=True,
        )
