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


def test_a_peak_is_of_the_steps_since_the_last_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    progress = Progress(SimpleNamespace(), State())  # type: ignore[arg-type]
    for losses, peak in (([2.0, 12.0, 4.0, 3.0, 4.0], 3.0), ([6.0], 1.0), ([0.0, 0.0], 0.0)):
        for loss in losses:
            progress.show(State(), {"loss": loss, "loss/next_item": 100.0})
        assert progress.peak() == {"health/loss_peak": peak}
