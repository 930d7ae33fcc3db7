"""What a worker of Ray prints."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import jobs
import pytest
import ray

SCRIPT = """
import logging, sys, time, weakref
import ray
from rsllm.compute.start import start_ray

class Held: pass

@ray.remote
def drop():
    for error in (SystemExit(1), ValueError("kept")):
        def raises(reference, error=error):
            raise error
        held = Held()
        watch = weakref.ref(held, raises)
        del held

@ray.remote
def warn():
    for warning in ("Found multiple active Ray instances: {a, b}.", "a warning to keep"):
        logging.getLogger("ray._private.services").warning(warning)

start_ray()
ray.get([warn.remote(), drop.remote()])
sys.stdin.read()
"""


@pytest.mark.ray
def test_only_the_end_of_a_worker_and_a_second_ray_are_kept_from_the_terminal(
    ray_cluster: str,
) -> None:
    """What is kept comes last, so what is not there by then was kept back."""
    command, pipe = [sys.executable, "-c", SCRIPT], subprocess.PIPE
    joined = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=joined, text=True
    ) as job:
        assert job.stdout
        shown = ""
        while not ("ValueError: kept" in shown and "a warning to keep" in shown):
            line = job.stdout.readline()
            assert line, f"it ended early: {shown}"
            shown += line
        shown += job.communicate()[0]
    assert job.returncode == 0, shown
    assert "SystemExit" not in shown
    assert "multiple active" not in shown


@pytest.mark.ray
def test_on_a_terminal_training_is_a_bar(ray_cluster: str, tmp_path: Path) -> None:
    """One line that is drawn again; in a file there are lines every half a minute instead."""
    joined = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "TERM": "xterm"}
    fit = [*jobs.CLI, "fit", "--data", "synthetic", "--set", "recommender.max_epochs=1"]
    fit += ["--storage", str(tmp_path)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 110, 0, 0))
    with subprocess.Popen(
        fit, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | joined
    ) as job:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # what Linux says at the end of a terminal
            while some := os.read(ours, 4096):
                shown += some
    os.close(ours)
    text = shown.decode()
    assert job.returncode == 0, text
    (run,) = (f"recommender-{folder.name}" for folder in (tmp_path / "recommender").glob("*"))
    bars = [line for line in text.split("\r") if run in line]
    assert any(" steps/s]" in bar for bar in bars), text
    assert "magic" not in text
    assert "waiting for data" not in text
