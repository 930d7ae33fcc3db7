"""The main job as a user runs it: a process of its own, at the smallest scale that is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

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
    deadline = time.monotonic() + 300
    while not reached():
        assert job.poll() is None, f"the job ended early:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the job is stuck:\n{log.read_text()}"
        time.sleep(0.1)
