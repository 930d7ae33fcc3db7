"""A preparation that was killed leaves nothing half done, and the same command ends the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import jobs
import pytest

from rsllm.cli import main
from rsllm.data.synthetic import write_world
from rsllm.store.artifacts import MANIFEST, read_json


def _files(store: Path) -> dict[str, str]:
    (manifest,) = (store / "data").glob(f"[0-9a-f]*/{MANIFEST}")
    files = read_json(manifest)["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


@pytest.mark.ray
def test_killed_and_repeated_equals_uninterrupted(tmp_path: Path, ray_cluster: str) -> None:
    world = tmp_path / "world"
    write_world(world, num_users=4000, num_items=500, length=50, seed=0, noise=0.5)
    stores = [tmp_path / name for name in ("whole", "killed")]
    words = [["prepare", "--data", str(world), "--storage", str(store)] for store in stores]
    assert main(words[0]) == 0
    log = tmp_path / "log"
    with jobs.started([*jobs.CLI, *words[1]], log) as job:
        dealt = "data/.*.staging/.scratch/dealt-*/*.arrow"
        jobs.wait_until(lambda: list(stores[1].glob(dealt)), job, log)
        job.send_signal(signal.SIGKILL)
        job.wait(timeout=60)
    assert not list((stores[1] / "data").glob("[0-9a-f]*"))
    assert main(words[1]) == 0
    assert _files(stores[0]) == _files(stores[1])
    (counts,) = (stores[1] / "data").glob("[0-9a-f]*/counts.json")
    assert json.loads(counts.read_text())["raw"]["read"] == 200_500
