"""Drivers that are killed or told to leave, and Ray's own notes torn: the same command goes on."""

from __future__ import annotations

import signal
import subprocess
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
    make_run: Callable[..., Run], uninterrupted: Run, number: signal.Signals
) -> None:
    run = make_run(Faults().wait(rank=0, step=INTERVAL + 2, seconds=60))
    assert end(run, number) in CODES[number], run.log.read_text()
    assert "Traceback" not in run.log.read_text()
    again = run.finish()
    assert again.returncode == 0, again.stdout
    assert run.weights() == uninterrupted.weights()
    assert [step for _, step in run.notes(0, "restored")] == [0, INTERVAL]


def test_torn_notes_of_ray(make_run: Callable[..., Run], uninterrupted: Run) -> None:
    """Ray Train would not start on these; rsllm gives it no checkpoints to take notes of."""
    run = make_run(Faults().wait(rank=0, step=INTERVAL + 2, seconds=60))
    end(run, signal.SIGKILL)
    (folder,) = (run.store / "ray").iterdir()
    assert not list(folder.rglob("*.json"))
    (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text("{")
    assert run.finish().returncode == 0
    assert run.weights() == uninterrupted.weights()


def test_two_runs_of_one_artifact(make_run: Callable[..., Run], uninterrupted: Run) -> None:
    """The second waits for the first and trains nothing."""
    run = make_run(Faults().wait(rank=0, step=2, seconds=20))
    with run.started() as job:
        jobs.wait_until(lambda: (run.store / "notes" / "fault-0").exists(), job, run.log)
        second = subprocess.run(run.command, capture_output=True, text=True, timeout=180)
        assert job.wait(timeout=60) == 0
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"waiting for process {job.pid}" in second.stdout
    assert [step for _, step in run.notes(0, "restored")] == [0], "one run trained"
    assert run.weights() == uninterrupted.weights()
