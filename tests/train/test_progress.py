"""What a run says of its pace and cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from rsllm.train.checkpoints import State
from rsllm.train.loop import Progress


@pytest.mark.parametrize("workers", [1, 3])
def test_device_seconds_are_of_all_workers(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: workers)
    task: Any = SimpleNamespace(rows_per_step=8)
    state = State(step=5, seconds=4.0)
    rates = Progress(task, state).rates(state, 0.0)
    assert (rates["seconds"], rates["device_seconds"]) == (4.0, 4.0 * workers)
    assert rates["samples"] == 40.0
