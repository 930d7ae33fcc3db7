"""What a worker of Ray prints."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import logging, time, weakref
import ray
from rsllm.cluster import start_ray

class Held: pass

@ray.remote
def drop(error):
    def raises(reference):
        raise error
    held = Held()
    watch = weakref.ref(held, raises)
    del held
    time.sleep(1)

@ray.remote
def warn():
    for warning in ("Found multiple active Ray instances: {a, b}.", "a warning to keep"):
        logging.getLogger("ray._private.services").warning(warning)
    time.sleep(1)

start_ray()
ray.get([warn.remote(), drop.remote(SystemExit(1)), drop.remote(ValueError("kept"))])
"""


def test_only_the_end_of_a_worker_and_a_second_ray_are_kept_from_the_terminal() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "ValueError: kept" in shown
    assert "SystemExit" not in shown
    assert "a warning to keep" in shown
    assert "multiple active" not in shown
