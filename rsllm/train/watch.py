"""What a worker watches between steps: checkpoints that are due, signals to leave, hangs."""

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
"""Of a run's time may go into checkpoints between validations."""

STDERR = 2
_told_to_leave = False


def hear_sigterm() -> None:
    """Let SIGTERM end this process's run at the next step; a second one ends it at once.

    Runs in the main thread.
    """

    def leave(number: int, frame: Any) -> None:
        global _told_to_leave
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _told_to_leave = True

    signal.signal(signal.SIGTERM, leave)


class Watch:
    """Looks around after each step, with the same answer on all ranks.

    Args:
        checkpoint_seconds: between two checkpoints, or more where they are costly.
        timeout_seconds: without a look around; then the stacks of all threads are printed.
    """

    def __init__(self, checkpoint_seconds: float, timeout_seconds: float = 600.0) -> None:
        self.checkpoint_seconds, self.timeout_seconds = checkpoint_seconds, timeout_seconds
        self.saved = time.monotonic()
        self.cost = self.spent = 0.0
        self.leaves = False

    def looks(self, engine: Engine) -> bool:
        """Whether to save now. Only rank 0's clock counts; a signal to any rank does."""
        faulthandler.dump_traceback_later(self.timeout_seconds, file=STDERR)
        interval = max(self.checkpoint_seconds, self.cost / CHECKPOINT_SHARE)
        due = time.monotonic() - self.saved >= interval
        due, self.leaves = engine.agree(due, _told_to_leave)
        return due or self.leaves

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Times a checkpoint."""
        start = time.monotonic()
        yield
        self.saved = time.monotonic()
        self.cost = self.saved - start
        self.spent += self.cost

    def rests(self) -> None:
        """There are no more steps to wait for."""
        faulthandler.cancel_dump_traceback_later()

    def leave_if_told(self) -> None:
        """End the run after the step whose checkpoint was just saved.

        Raises:
            Interrupted: a worker got SIGTERM.
        """
        if self.leaves:
            raise Interrupted("a worker was told to leave; the run goes on from this step")
