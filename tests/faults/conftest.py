"""Runs that meet faults, on stores that lack only what they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Run, append_to_log, copy_store
from faults import Faults


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how each test ended."""
    if report.when == "call":
        test = report.nodeid.split("::")[-1]
        append_to_log(test=test, outcome=report.outcome, took=round(report.duration, 1))


@pytest.fixture(scope="session")
def one_node() -> Iterator[dict[str, str]]:
    """The environment in which runs share a Ray of one node, which outlives them."""
    from driver import CLUSTER, OF_ITS_OWN  # Ray reads whether it asks for tokens when imported
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, connect=False, head_node_args=OF_ITS_OWN)
    yield {CLUSTER: made.address}
    made.shutdown()


@pytest.fixture(scope="session")
def uninterrupted(
    random_llm: Path, one_node: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The run that nothing happens to, from raw data on."""
    run = Run(tmp_path_factory.mktemp("twin") / "store", random_llm, environment=one_node)
    done = run.finish()
    assert done.returncode == 0, done.stdout
    return run


@pytest.fixture(scope="session")
def sharded(uninterrupted: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same under ZeRO 3, whose rounding AdamW magnifies to 2e-5 in some weights."""
    store = tmp_path_factory.mktemp("sharded") / "store"
    copy_store(uninterrupted, store, "stage-2")
    settings, environment = {"compute.zero_stage": 3}, uninterrupted.environment
    run = Run(store, uninterrupted.backbone, settings=settings, environment=environment)
    done = run.finish()
    assert done.returncode == 0, done.stdout
    return run


@pytest.fixture
def make_run(uninterrupted: Run, tmp_path: Path) -> Callable[..., Run]:
    """Makes a run on a store that lacks the artifacts of some stages, by default of stage 2."""

    def make(
        faults: Faults | None = None, missing: tuple[str, ...] = ("stage-2",), **options: Any
    ) -> Run:
        store = tmp_path / "store"
        if not store.exists():
            copy_store(uninterrupted, store, *missing)
        return Run(store, uninterrupted.backbone, faults or Faults(), **options)

    return make
