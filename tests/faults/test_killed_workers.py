"""Workers that are killed, told to leave or hang: the run ends as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
from driver import CLUSTER
from fault_runs import STEPS, Run
from faults import COMMIT_POINTS, Faults

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
INTERVAL = STEPS // 3


@pytest.fixture
def make_run(make_run: Callable[..., Run], one_node: dict[str, str]) -> Callable[..., Run]:
    """Makes runs on one Ray: a start of it takes longer than most of what is tested."""
    return partial(make_run, environment=one_node)


def check(run: Run, twin: Run, *lost: int) -> None:
    """It ended well, with the twin's weights, after doing so many steps again for each fault."""
    done = run.finish()
    assert done.returncode == 0, done.stdout
    assert run.weights() == twin.weights()
    steps = [number for _, number in run.notes(0, "step")]
    assert sorted(set(steps)) == list(range(max(steps) + 1)), "no step is left out"
    again = [run.steps_again(number) for number in range(len(lost))]
    assert [n <= most for n, most in zip(again, lost, strict=True)] == [True] * len(lost), again
    assert len(steps) - len(set(steps)) == sum(again)
    for number in range(len(lost)):
        run.record(run.met(number), number, run.faults.name(number))


def test_workers_killed_and_told_to_leave(make_run: Callable[..., Run], uninterrupted: Run) -> None:
    """Killed before the first checkpoint, long after one, and just after one; then told."""
    faults = Faults().kill(rank=1, step=3).kill(rank=1, step=2 * INTERVAL - 1)
    faults.kill(rank=0, step=2 * INTERVAL).terminate(rank=1, step=2 * INTERVAL + 3)
    check(make_run(faults), uninterrupted, 3, INTERVAL - 1, 0, 0)


def test_a_worker_killed_in_stage_1(make_run: Callable[..., Run], uninterrupted: Run) -> None:
    run = make_run(Faults().kill(rank=0, step=10), missing=("stage-1", "stage-2"))
    done = run.finish()
    assert done.returncode == 0, done.stdout
    assert run.weights("stage-1") == uninterrupted.weights("stage-1")
    assert run.weights() == uninterrupted.weights()
    run.record(run.met(), fault="kill at step 10 of stage 1")


def test_killed_in_a_commit(make_run: Callable[..., Run], uninterrupted: Run) -> None:
    """At each point of the second commit, which is made anew every time but the last."""
    faults = Faults()
    for point in COMMIT_POINTS:
        faults.kill(rank=0, step=2 * INTERVAL, during=point)
    lost = [0 if point == "after rename" else INTERVAL for point in COMMIT_POINTS]
    run = make_run(faults)
    check(run, uninterrupted, *lost)
    assert not list(run.store.rglob("*.staging"))


def test_a_worker_that_hangs(make_run: Callable[..., Run], uninterrupted: Run) -> None:
    run = make_run(
        Faults().stop(rank=1, step=INTERVAL + 1), settings={"compute.timeout_seconds": 30}
    )
    check(run, uninterrupted, 1)
    assert "Timeout (0:00:30)!" in run.log.read_text(), "the stacks of the one that waited"
    assert "most recent call first" in run.log.read_text()


def test_an_error_that_would_come_again(make_run: Callable[..., Run]) -> None:
    run = make_run(Faults().nan(rank=1, step=7))
    done = run.finish()
    assert done.returncode == 1
    (error,) = (line for line in done.stdout.splitlines() if line.startswith("rsllm: error: "))
    assert "the loss of step 7 is not finite on worker 0, 1;" in error
    assert [number for _, number in run.notes(0, "restored")] == [0, 6], "two attempts"
    assert "Traceback" not in done.stdout


HOLD = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
ray.get(ray.util.placement_group([{"CPU": 2}]).ready())
print("held", flush=True)
sys.stdin.read()
"""


def test_a_cluster_without_room(make_run: Callable[..., Run], one_node: dict[str, str]) -> None:
    """Somebody else holds two of its three CPUs."""
    run = make_run(settings={"compute.wait_seconds": 8})
    command, pipe = [sys.executable, "-c", HOLD, one_node[CLUSTER]], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        done = run.finish()
        holder.communicate()
    assert done.returncode == 1
    assert "stage2 needs 2 workers" in done.stdout
    assert "within 8 s the cluster had no room" in done.stdout
    assert "Traceback" not in done.stdout
