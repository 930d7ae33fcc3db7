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

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
INTERVAL = STEPS // 3
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


def test_a_driver_that_ends(
    make_run: Callable[..., Run], uninterrupted: Run, one_node: dict[str, str]
) -> None:
    """Three times in one run: first with a Ray that ends with it, then with one that outlives it.

    Ray Train would not start on torn notes of its own; rsllm gives it no checkpoints to note.
    """
    faults, started = Faults(), []
    for number in range(len(ENDS)):
        faults.wait(rank=0, step=INTERVAL + 2 + number, seconds=60)
    run = make_run(faults)
    for number, (name, code) in enumerate(ENDS.items()):
        started.append(time.time())
        assert end(run, number, name) == code, run.log.read_text()
        assert "Traceback" not in run.log.read_text()
        tear(run)
        run.environment = one_node
    started.append(time.time())
    again = run.finish()
    assert again.returncode == 0, again.stdout
    assert run.weights() == uninterrupted.weights()
    assert [step for _, step in run.notes(0, "restored")] == [0, *[INTERVAL] * len(ENDS)]
    for number, name in enumerate(ENDS):
        run.record(started[number + 1], number, fault=f"{name.name} to the driver")


def end(run: Run, fault: int, number: signal.Signals) -> int:
    """Send the driver a signal when a fault lets it wait; returns its exit code."""
    with run.started() as job:
        jobs.wait_until(lambda: (run.store / "notes" / f"fault-{fault}").exists(), job, run.log)
        job.send_signal(number)
        return job.wait(timeout=60)


def tear(run: Run) -> None:
    """Ray's own notes of the run."""
    (folder,) = (run.store / "ray").iterdir()
    notes = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert set(folder.rglob("*.json")) <= {notes}
    notes.write_text("{")


@pytest.mark.long
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
