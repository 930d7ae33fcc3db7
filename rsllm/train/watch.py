"""What a worker watches between steps: checkpoints that are due, signals to leave, hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rsllm.errors import Interrupted

if TYPE_CHECKING:  # DeepSpeed must not be imported before its worker is prepared
    from rsllm.train.engine import Engine

CHECKPOINT_SHARE = 0.05
"""Of a run's time may go into checkpoints between validations."""
LOOK_SECONDS = 5.0
"""Between two questions whether a node of the run is about to be taken away."""

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
        node_leaves: whether a node of the run is about to be taken away; all ranks ask alike.
    """

    def __init__(
        self,
        checkpoint_seconds: float,
        timeout_seconds: float = 600.0,
        node_leaves: Callable[[], bool] = lambda: False,
    ) -> None:
        self.checkpoint_seconds, self.timeout_seconds = checkpoint_seconds, timeout_seconds
        self.node_leaves = node_leaves
        self.saved = self.looked = time.monotonic()
        self.cost = self.spent = 0.0
        self.leaves = self.warned = False

    def looks(self, engine: Engine) -> bool:
        """Whether to save now. Only rank 0's clock counts; a signal to any rank does."""
        if sys.__stderr__:
            faulthandler.dump_traceback_later(self.timeout_seconds, file=sys.__stderr__)
        now = time.monotonic()
        interval = max(self.checkpoint_seconds, self.cost / CHECKPOINT_SHARE)
        due, asks = now - self.saved >= interval, now - self.looked >= LOOK_SECONDS
        due, asks, told = engine.agree([due, asks], _told_to_leave)
        self.leaves = told
        return due or told or (asks and self._warns(now))

    def _warns(self, now: float) -> bool:
        """True once, when a node is first known to go."""
        self.looked = now
        warned, self.warned = self.warned, self.node_leaves()
        return self.warned and not warned

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Times a checkpoint."""
        start = time.monotonic()
        yield
        self.saved = time.monotonic()
        self.cost = self.saved - start
        self.spent += self.cost

    def leave_if_told(self) -> None:
        """End the run after the step whose checkpoint was just saved.

        Raises:
            Interrupted: a worker got SIGTERM.
        """
        if self.leaves:
            raise Interrupted("a worker was told to leave; the run goes on from this step")
