"""What a run measures is in TensorBoard's files and among Ray's metrics."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rsllm.config import Experiment
from rsllm.plan import Resources, lay_out
from rsllm.runs import Store
from rsllm.train.launch import Assignment, _log

MEASURED = {
    "loss/next_item": 1.5,
    "MRR": 0.25,
    "tokens_per_second": 90.0,
    "data_wait_share": 0.125,
    "seconds": 4.0,
}


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    experiment = Experiment()
    return Assignment(
        stage="stage2",
        experiment=experiment,
        layout=lay_out(experiment.compute, Resources(cpus=2, gpus=0)),
        store=Store.open(tmp_path / "store"),
        kind="stage-2",
        inputs={"test": tmp_path.name},
        data="",
    )


def exported(run: str) -> dict[str, float]:
    """Ray's metrics of a run, as Prometheus reads them from the node, in lower case."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    lines = re.findall(r"^ray_rsllm_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, tags, value in lines if f'run="{run}"' in tags}


@pytest.mark.ray
def test_losses_scores_rates_memory_and_cost(ray_cluster: str, assignment: Assignment) -> None:
    gibibyte = 1024**3
    with _log(assignment) as log:
        log(3, MEASURED)
    curves = EventAccumulator(str(assignment.store.root / "tensorboard" / assignment.name)).Reload()
    drawn = {name: curves.Scalars(name)[0] for name in curves.Tags()["scalars"]}
    assert {event.step for event in drawn.values()} == {3}
    found = {name: event.value for name, event in drawn.items()}
    resident = psutil.Process().memory_info().rss / gibibyte
    assert (
        resident * 0.99 <= found.pop("memory_gibibytes") <= psutil.virtual_memory().total / gibibyte
    )
    assert found == MEASURED | {"device_seconds": 4.0 * assignment.layout.workers}
    names = {re.sub(r"\W+", "_", name).lower() for name in drawn}
    deadline = time.monotonic() + 60
    while not names <= exported(assignment.name).keys():
        assert time.monotonic() < deadline, names - exported(assignment.name).keys()
        time.sleep(1)
    shown = exported(assignment.name)
    assert shown["mrr"] == MEASURED["MRR"]
    assert shown["loss_next_item"] == MEASURED["loss/next_item"]
    assert shown["memory_gibibytes"] == pytest.approx(drawn["memory_gibibytes"].value)
