"""What a worker of Ray prints."""

from __future__ import annotations

import os
import subprocess
import sys

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
