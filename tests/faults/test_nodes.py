"""Runs over several nodes of one Ray, and what happens when one of them dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jobs
import pytest
from driver import CLUSTER
from fault_runs import STEPS, Run
from faults import Faults
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
SPREAD = {"compute.placement": "spread", "compute.zero_stage": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes for one worker each; dead nodes are noticed soon."""
    made = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": 0,
            "_system_config": {
                "health_check_period_ms": 1000,
                "health_check_failure_threshold": 10,
                "health_check_timeout_ms": 1000,
            },
        },
    )
    for _ in range(2):
        made.add_node(num_cpus=2)
    yield made
    made.shutdown()


def options(cluster: Cluster, **settings: Any) -> dict[str, Any]:
    environment = {CLUSTER: cluster.address}
    return {"settings": SPREAD | settings, "environment": environment}


def node_of(run: Run, cluster: Cluster, rank: int) -> Any:
    """The node that has a rank's process."""
    import psutil

    pid = run.pid(rank)
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    return next(raylets[p.pid] for p in psutil.Process(pid).parents() if p.pid in raylets)


def killed(make_run: Callable[..., Run], cluster: Cluster, **settings: Any) -> Run:
    """A run whose second worker's node is about to be killed, well after a checkpoint."""
    faults = Faults().wait(rank=0, step=STEPS // 3 + 2, seconds=60)
    return make_run(faults, **options(cluster, **settings))


def wait_for_fault(run: Run, job: Any) -> None:
    jobs.wait_until(lambda: (run.store / "notes" / "fault-0").exists(), job, run.log)


@pytest.mark.long
def test_each_worker_on_a_node_of_its_own(
    make_run: Callable[..., Run], sharded: Run, cluster: Cluster
) -> None:
    run = make_run(**options(cluster))
    done = run.finish()
    assert done.returncode == 0, done.stdout
    assert run.weights_differ(sharded) < 1e-6


def test_a_killed_node_that_is_replaced(
    make_run: Callable[..., Run], sharded: Run, cluster: Cluster
) -> None:
    run = killed(make_run, cluster)
    with run.started() as job:
        wait_for_fault(run, job)
        cluster.remove_node(node_of(run, cluster, rank=1), allow_graceful=False)
        cluster.add_node(num_cpus=2)
        replaced = time.time()
        assert job.wait(timeout=600) == 0, run.log.read_text()
    assert run.weights_differ(sharded) < 1e-6
    assert [step for _, step in run.notes(0, "restored")] == [0, STEPS // 3]
    run.record(replaced)


def test_a_killed_node_that_is_not_replaced(make_run: Callable[..., Run], cluster: Cluster) -> None:
    run = killed(make_run, cluster, **{"compute.wait_seconds": 30})
    with run.started() as job:
        wait_for_fault(run, job)
        cluster.remove_node(node_of(run, cluster, rank=1), allow_graceful=False)
        assert job.wait(timeout=600) == 1
    cluster.add_node(num_cpus=2)
    shown = run.log.read_text()
    assert "stage2 needs 2 workers" in shown
    assert "within 30 s the cluster had no room" in shown
