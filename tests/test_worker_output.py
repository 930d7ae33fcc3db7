"""What a worker of Ray prints on its way out."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import time, weakref
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

start_ray()
ray.get([drop.remote(SystemExit(1)), drop.remote(ValueError("kept"))])
"""


def test_only_the_end_of_the_worker_itself_is_kept_from_the_terminal() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "ValueError: kept" in shown
    assert "SystemExit" not in shown
