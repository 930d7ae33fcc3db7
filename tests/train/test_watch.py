"""Signals that a worker hears."""

from __future__ import annotations

import signal
import subprocess
import sys

SCRIPT = """
import time
from rsllm.train import watch

watch.hear_sigterm()
print("ready", flush=True)
while not watch._preempted:
    time.sleep(0.01)
print("noted", flush=True)
time.sleep(60)
"""


def test_the_first_sigterm_is_noted_and_the_second_ends_the_worker() -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        worker.terminate()
        assert worker.stdout.readline() == "noted\n"
        worker.terminate()
        assert worker.wait(timeout=60) == -signal.SIGTERM
