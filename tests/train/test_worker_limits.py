"""What a worker makes of memory that runs out and of storage that it does not see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rsllm.errors import ConfigError
from rsllm.store.artifacts import Store
from rsllm.train import worker as launch


@pytest.mark.parametrize(
    ("stage", "knobs"),
    [
        ("stage2", ["stage2.batch_size", "gradient_checkpointing", "compute.offload"]),
        ("recommender", ["recommender.batch_size"]),
    ],
)
def test_memory_that_runs_out_names_the_knobs(stage: Any, knobs: list[str]) -> None:
    assignment: Any = SimpleNamespace(stage=stage)
    with pytest.raises(ConfigError) as caught, launch._memory_explained(assignment):
        torch.empty(2**60, dtype=torch.uint8)
    assert all(knob in str(caught.value) for knob in knobs)


def test_other_errors_stay_what_they_are() -> None:
    assignment: Any = SimpleNamespace(stage="stage2")
    with (
        pytest.raises(RuntimeError, match="size of tensor") as caught,
        launch._memory_explained(assignment),
    ):
        torch.zeros(2) + torch.zeros(3)
    assert not isinstance(caught.value, ConfigError)


def test_storage_of_another_node_is_refused(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "not here")
    seen: Any = SimpleNamespace(store=Store(str(tmp_path)), checkpoints=checkpoints)
    with pytest.raises(ConfigError, match="every node of the cluster mounts, or a URI"):
        launch._require_storage(seen)


@pytest.mark.parametrize(
    ("labels", "dollars"),
    [
        ({}, None),
        ({"gpus": "1", "dollars-per-hour": "0.98"}, 1.96),
        ({"gpus": "4", "dollars-per-hour": "8"}, 4.0),
        ({"gpus": "0", "dollars-per-hour": "0.2"}, 0.4),
    ],
)
def test_what_an_hour_of_two_workers_costs(
    labels: dict[str, str], dollars: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = SimpleNamespace(get_node_labels=lambda: labels)
    monkeypatch.setattr("ray.get_runtime_context", lambda: node)
    layout: Any = SimpleNamespace(workers=2, use_gpu=False)
    spent = launch._spent(3600, layout)
    assert spent.pop("memory_gibibytes") > 0
    assert spent == ({} if dollars is None else {"dollars": pytest.approx(dollars)})
