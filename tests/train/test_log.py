"""What a run measures is in TensorBoard's files and among Ray's metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MEASURED = {
    "loss/next_item": 1.5,
    "MRR": 0.25,
    "tokens_per_second": 90.0,
    "data_wait_share": 0.125,
    "seconds": 4.0,
    "device_seconds": 8.0,
}


@pytest.mark.ray
def test_losses_scores_rates_memory_and_cost(tmp_path: Path) -> None:
    script = Path(__file__).with_name("node_metrics.py")
    command = [sys.executable, str(script), str(tmp_path / "store"), json.dumps(MEASURED)]
    environment = os.environ | {"RAY_enable_metrics_collection": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    [folder] = (tmp_path / "store" / "tensorboard").iterdir()
    curves = EventAccumulator(str(folder)).Reload()
    drawn = {name: curves.Scalars(name)[0] for name in curves.Tags()["scalars"]}
    assert {event.step for event in drawn.values()} == {3}
    found = {name: event.value for name, event in drawn.items()}
    memory_gibibytes = found.pop("memory_gibibytes")
    assert 0.1 <= memory_gibibytes <= psutil.virtual_memory().total / 1024**3
    assert found == MEASURED
    assert shown["mrr"] == MEASURED["MRR"]
    assert shown["loss_next_item"] == MEASURED["loss/next_item"]
    assert shown["memory_gibibytes"] == pytest.approx(memory_gibibytes)
