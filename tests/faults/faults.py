"""Faults as data, and how they get into the workers of a run; nothing of this is in rsllm.

    Faults().kill(rank=1, step=17)

A fault happens once, when its rank is about to take its step (counted from 0) or is at a point of
the commit after so many steps; `nan` happens at every attempt. What each rank did when is noted.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT = "RSLLM_TEST_FAULTS"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}
COMMIT_POINTS = ("first part", "before manifest", "before rename", "after rename")


@dataclass
class Faults:
    """What goes wrong in a run."""

    planned: list[dict[str, Any]] = field(default_factory=list)
    folder: str = ""
    """Where notes are kept."""

    def _add(self, kind: str, rank: int, step: int, during: str = "step") -> Faults:
        self.planned.append({"kind": kind, "rank": rank, "step": step, "during": during})
        return self

    def kill(self, rank: int, step: int, during: str = "step") -> Faults:
        """SIGKILL, at a step or at one of `COMMIT_POINTS` of the commit after it."""
        return self._add("kill", rank, step, during)

    def stop(self, rank: int, step: int) -> Faults:
        """SIGSTOP: it hangs."""
        return self._add("stop", rank, step)

    def terminate(self, rank: int, step: int) -> Faults:
        """SIGTERM, as a scheduler sends it ahead of its SIGKILL."""
        return self._add("terminate", rank, step)

    def nan(self, rank: int, step: int) -> Faults:
        """A weight of one rank is not a number."""
        return self._add("nan", rank, step)

    def wait(self, rank: int, step: int, seconds: float = 600.0) -> Faults:
        """A slow step, time enough to do something to the run from outside."""
        self._add("wait", rank, step)
        self.planned[-1]["seconds"] = seconds
        return self

    def name(self, number: int) -> str:
        """What one of them is called in a log."""
        fault = self.planned[number]
        return "{kind} at step {step}, {during}".format(**fault).removesuffix(", step")

    def json(self) -> str:
        """For the environment of the workers."""
        return json.dumps(asdict(self))


def install() -> None:
    """Runs in each worker when it starts: lets its training meet the faults."""
    from rsllm.compute.start import prepare_worker
    from rsllm.train import worker as launch

    prepare_worker()
    faults, work = Faults(**json.loads(os.environ[ENVIRONMENT])), launch.work

    def work_with_faults(config: dict[str, Any]) -> None:
        _patch(_Meeting(faults))
        work(config)

    launch.work = work_with_faults


class _Meeting:
    def __init__(self, faults: Faults) -> None:
        import torch.distributed as dist

        self.faults, self.rank = faults, dist.get_rank()
        self.folder = Path(faults.folder)
        self.note(f"process {os.getpid()}")

    def note(self, text: str) -> None:
        with (self.folder / f"rank-{self.rank}.log").open("a") as file:
            file.write(f"{time.time()} {text}\n")

    def at(self, during: str, step: int, engine: Any = None) -> None:
        for number, fault in enumerate(self.faults.planned):
            if (fault["rank"], fault["step"], fault["during"]) == (self.rank, step, during):
                self._meet(number, fault, engine)

    def _meet(self, number: int, fault: dict[str, Any], engine: Any) -> None:
        marker = self.folder / f"fault-{number}"
        if fault["kind"] != "nan" and marker.exists():
            return
        marker.write_text(str(time.time()))
        if fault["kind"] in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault["kind"]])
            time.sleep(1)  # a signal that is heard is heard by the main thread
        elif fault["kind"] == "wait":
            time.sleep(fault["seconds"])
        else:
            parameter = next(p for p in engine.objective.parameters() if p.requires_grad)
            parameter.data.fill_(float("nan"))


def _patch(meeting: _Meeting) -> None:
    from rsllm.train import checkpoints
    from rsllm.train.checkpoints import Checkpoints
    from rsllm.train.engine import Engine

    take_step, restore = Engine.step, Checkpoints.restore
    write, seal, prune, commit = (
        checkpoints._write,
        checkpoints.seal,
        Checkpoints._prune,
        Checkpoints.commit,
    )
    saving = {"step": 0}

    def step(self: Engine, batches: Any, number: int) -> Any:
        meeting.at("step", number, self)
        done = take_step(self, batches, number)
        meeting.note(f"step {number}")
        return done

    def restored(self: Checkpoints, *arguments: Any, **options: Any) -> Any:
        state = restore(self, *arguments, **options)
        meeting.note(f"restored {state.step}")
        return state

    def committing(self: Checkpoints, engine: Any, state: Any) -> None:
        saving["step"] = state.step
        commit(self, engine, state)

    def around(call: Callable[..., Any], before: str = "", after: str = "") -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            meeting.at(before, saving["step"])
            result = call(*arguments)
            meeting.at(after, saving["step"])
            return result

        return called

    Engine.step, Checkpoints.restore, Checkpoints.commit = step, restored, committing  # type: ignore
    checkpoints._write = around(write, after="first part")  # type: ignore[assignment]
    checkpoints.seal = around(seal, before="before manifest", after="before rename")
    Checkpoints._prune = around(prune, before="after rename")  # type: ignore[method-assign]
