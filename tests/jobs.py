"""The main job as a user runs it: a process of its own, at the smallest scale that is whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, "experiments/tune_loss_weights.py"]
CLI = [str(Path(sys.executable).with_name("rsllm"))]
SETTINGS = {
    "data.window": 5,
    "data.num_candidates": 8,
    "recommender.max_epochs": 1.0,
    "catalogue.max_epochs": 1.0,
    "backbone.layers": 0,
    "stage1.samples": 8,
    "stage2.samples": 16,
    "stage2.batch_size": 8,
    "stage2.validations": 2,
    "evaluation.validation_rows": 8,
    "evaluation.test_rows": 8,
    "evaluation.generation_rows": 4,
    "evaluation.max_new_tokens": 4,
}
SMALL = ["--budget", "quick", "--data", "synthetic"]
SMALL += [word for path, value in SETTINGS.items() for word in ("--set", f"{path}={value}")]
TINY = [*SMALL, "--trials", "2"]


def environment() -> dict[str, str]:
    """This process's, without what would choose for the user; a Ray of its own is started."""
    chosen = ("RAY_API_SERVER_ADDRESS", "RSLLM_BUDGET", "RSLLM_STORAGE")
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    return kept | {"RAY_ADDRESS": "local"}


def run(command: list[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root to its end."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(), timeout=seconds, capture_output=True, text=True
    )


def run_here(script: str, *words: str) -> str:
    """Run a script's `main` in this process, and return what it printed."""
    main, said = runpy.run_path(str(ROOT / script))["main"], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [script, *words])
        main()
    return said.getvalue()


def exit_code(script: str, *words: str) -> Any:
    """Run a script in this process as if it were one of its own, and return how it exited."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return exited.value.code


@contextmanager
def started(command: list[str], log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running command that leads its own session, its output in `log`; ends with the block."""
    with log.open("wb") as file:
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | more,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
    try:
        yield job
    finally:
        kill(job)


def _hear_interrupts() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL the command's process group and wait until all that it started is gone."""
    if job.poll() is not None:
        return
    started = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    for process in alive:
        process.kill()


def wait_until(reached: Callable[[], object], job: subprocess.Popen[bytes], log: Path) -> None:
    """Wait while a job runs until it has got somewhere."""
    deadline = time.monotonic() + 900
    while not reached():
        assert job.poll() is None, f"the job ended early:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the job is stuck:\n{log.read_text()}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Finished:
    """A study that was interrupted by Ctrl-C and SIGKILL on its way."""

    command: list[str]
    store: Path
    interrupt_code: int
    interrupt_log: str
    before: dict[Path, int]
    """Manifests that stood when it was killed, with their times of change."""
    done: subprocess.CompletedProcess[str]

    @property
    def folder(self) -> Path:
        (folder,) = (self.store / "studies").iterdir()
        return folder

    @property
    def results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return results


def finished(backbone: Path, folder: Path) -> Finished:
    """Run the main job with a store in `folder`; interrupt it, kill it, and let it finish."""
    store, log = folder / "store", folder / "log"
    command = [*SCRIPT, *TINY, "--backbone", str(backbone), "--storage", str(store)]

    def run_until(reached: Callable[[], object], stop: Callable[[Any], object]) -> int | None:
        with started(command, log) as job:
            wait_until(reached, job, log)
            stop(job)
            return job.poll()

    def interrupt(job: subprocess.Popen[bytes]) -> None:
        job.send_signal(signal.SIGINT)
        job.wait(timeout=300)

    code = run_until(lambda: list(store.glob("running/stage-2-*")), interrupt)
    interrupt_log = log.read_text()
    run_until(lambda: artifacts(store, "stage-2"), kill)
    before = artifacts(store)
    done = run(command, seconds=600)
    return Finished(command, store, code or 0, interrupt_log, before, done)


def artifacts(store: Path, kind: str = "*") -> dict[Path, int]:
    """Manifests of finished artifacts and when they last changed."""
    found = store.glob(f"{kind}/[0-9a-f]*/manifest.json")
    return {path: path.stat().st_mtime_ns for path in found}
