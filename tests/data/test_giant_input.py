"""Two million interactions are prepared in bounded memory; asked for by RSLLM_TEST_GIANT=1."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import jobs
import psutil
import pytest

from rsllm.data.synthetic import write_world

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        os.environ.get("RSLLM_TEST_GIANT") != "1", reason="needs RSLLM_TEST_GIANT=1"
    ),
    pytest.mark.timeout(1800),
]


def test_memory_of_every_process_stays_below_two_gigabytes(tmp_path: Path) -> None:
    world, store, log = (tmp_path / name for name in ("world", "store", "log"))
    write_world(world, num_users=40_000, num_items=5000, length=50, seed=0, noise=0.5)
    command = [*jobs.CLI, "prepare", "--data", str(world), "--storage", str(store)]
    peaks: dict[str, int] = {}
    with jobs.started(command, log) as job:
        root = psutil.Process(job.pid)
        while job.poll() is None:
            with contextlib.suppress(psutil.Error):
                for process in [root, *root.children(recursive=True)]:
                    name, own = process.name(), process.memory_full_info().uss
                    peaks[name] = max(peaks.get(name, 0), own)
            time.sleep(0.2)
    assert job.returncode == 0, log.read_text()
    (counts,) = store.glob("data/[0-9a-f]*/counts.json")
    assert json.loads(counts.read_text())["interactions"]["read"] == 2_000_000
    assert any(name.startswith("ray::") for name in peaks), "workers were seen"
    print({name: f"{peak >> 20} MiB" for name, peak in peaks.items()})
    assert max(peaks.values()) < 2e9, peaks
