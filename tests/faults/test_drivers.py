"""Drivers that are killed or told to leave, and Ray's own notes torn: the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

import jobs
import pytest
from fault_runs import STEPS, Run
from faults import Faults
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

pytestmark = pytest.mark.faults
INTERVAL = STEPS // 3
CODES = {signal.SIGINT: (130,), signal.SIGTERM: (143,), signal.SIGKILL: (-9,)}


def end(run: Run, number: signal.Signals) -> int:
    """Send a signal to the driver in the middle of stage 2, and wait for its end."""
    with run.started() as job:
        jobs.wait_until(lambda: (run.store / "notes" / "fault-0").exists(), job, run.log)
        job.send_signal(number)
        return job.wait(timeout=60)


@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
def test_a_driver_that_ends(
    make_run: Callable[..., Run],
    uninterrupted: Run,
    one_node: dict[str, str],
    number: signal.Signals,
) -> None:
    """On a Ray of its own, which ends with it, or on one that outlives it.

    Ray Train would not start on torn notes of its own; rsllm gives it no checkpoints to note.
    """
    environment = {} if number == signal.SIGINT else one_node
    faults = Faults().wait(rank=0, step=INTERVAL + 2, seconds=60)
    run = make_run(faults, environment=environment)
    assert end(run, number) in CODES[number], run.log.read_text()
    assert "Traceback" not in run.log.read_text()
    (folder,) = (run.store / "ray").iterdir()
    assert not list(folder.rglob("*.json"))
    (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text("{")
    started = time.time()
    again = run.finish()
    assert again.returncode == 0, again.stdout
    assert run.weights() == uninterrupted.weights()
    assert [step for _, step in run.notes(0, "restored")] == [0, INTERVAL]
    run.record(started)


def test_two_runs_of_one_artifact(
    make_run: Callable[..., Run], uninterrupted: Run, one_node: dict[str, str]
) -> None:
    """The second waits for the first and trains nothing."""
    run = make_run(Faults().wait(rank=0, step=2, seconds=15), environment=one_node)
    with run.started() as job:
        jobs.wait_until(lambda: (run.store / "notes" / "fault-0").exists(), job, run.log)
        environment = jobs.environment() | one_node
        second = subprocess.run(
            run.command, env=environment, capture_output=True, text=True, timeout=180
        )
        assert job.wait(timeout=60) == 0
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"waiting for process {job.pid}" in second.stdout
    assert [step for _, step in run.notes(0, "restored")] == [0], "one run trained"
    assert run.weights() == uninterrupted.weights()
