"""What is asked between steps: is a checkpoint due, was a worker preempted, does one hang?"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rsllm.errors import Interrupted

if TYPE_CHECKING:  # DeepSpeed must not be imported before its worker is prepared
    from rsllm.train.engine import Engine

CHECKPOINT_SHARE = 0.05
"""Most of a run's time that goes into checkpoints between validations."""

STDERR = 2
_preempted = False


def hear_sigterm() -> None:
    """Let SIGTERM end this process's run at the next step; a second one ends it at once.

    Runs in the main thread.
    """

    def leave(number: int, frame: Any) -> None:
        global _preempted
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _preempted = True

    signal.signal(signal.SIGTERM, leave)


class Watch:
    """Is asked after each step, and gives all ranks the same answer.

    Args:
        checkpoint_seconds: between two checkpoints, or more where they are costly.
        timeout_seconds: without a question, after which the stacks of all threads are printed.
    """

    def __init__(self, checkpoint_seconds: float, timeout_seconds: float = 600.0) -> None:
        self.checkpoint_seconds, self.timeout_seconds = checkpoint_seconds, timeout_seconds
        self.saved = time.monotonic()
        self.cost = self.spent = 0.0
        self.preempted = False

    def checkpoint_due(self, engine: Engine) -> bool:
        """Tell all ranks alike whether to save now, by rank 0's clock or a signal to any rank."""
        faulthandler.dump_traceback_later(self.timeout_seconds, file=STDERR)
        interval = max(self.checkpoint_seconds, self.cost / CHECKPOINT_SHARE)
        due = time.monotonic() - self.saved >= interval
        due, self.preempted = engine.agree(due, _preempted)
        return due or self.preempted

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Note when a checkpoint was saved, and how long it took."""
        start = time.monotonic()
        yield
        self.saved = time.monotonic()
        self.cost = self.saved - start
        self.spent += self.cost

    def stop(self) -> None:
        """Stop waiting for steps, of which there are no more."""
        faulthandler.cancel_dump_traceback_later()

    def raise_if_preempted(self) -> None:
        """End the run after the step whose checkpoint was just saved.

        Raises:
            Interrupted: a worker got SIGTERM.
        """
        if self.preempted:
            raise Interrupted("a worker was told to leave; the run goes on from this step")
