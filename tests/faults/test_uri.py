"""Nodes that share nothing but a URI: a worker is killed, and a study goes on from another head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
from driver import CLUSTER
from fault_runs import STEPS, Run
from faults import Faults
from ray.cluster_utils import Cluster

from rsllm.store.artifacts import MANIFEST, Mirror, read_json

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


@pytest.fixture
def cluster(bucket: str, tmp_path: Path) -> Iterator[Cluster]:
    """A head, which has no CPU, and two nodes for one worker each, all with caches of their own."""
    made = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0},
    )
    for node in ("node-b", "node-c"):
        made.add_node(num_cpus=2, env_vars={"RSLLM_CACHE": str(tmp_path / node)})
    yield made
    made.shutdown()


def test_nodes_that_share_nothing_but_a_uri(
    uninterrupted: Run, cluster: Cluster, bucket: str, tmp_path: Path
) -> None:
    """They train what one node does; each fetches what it reads once."""
    sources = [p.parent for p in sorted(uninterrupted.store.glob(f"*/*/{MANIFEST}"))]
    sources = [folder for folder in sources if folder.parent.name != "stage-2"]
    for folder in sources:
        Mirror(bucket).upload(f"{folder.parent.name}/{folder.name}", folder)
    run = Run(
        Path(bucket.removeprefix("objects://")),
        uninterrupted.backbone,
        Faults().kill(rank=1, step=STEPS // 3 + 2),
        settings={"compute.placement": "spread"},
        environment={CLUSTER: cluster.address},
        scheme="objects://",
    )
    done = run.finish()
    assert done.returncode == 0, done.stdout
    assert run.weights_differ(uninterrupted) < 1e-6
    steps = [number for _, number in run.notes(0, "step")]
    assert len(steps) == STEPS + 2, "it went on from the checkpoint at the URI"
    log = (tmp_path / "log").read_text().splitlines()
    fetched = Counter(line.removeprefix(f"get {run.store}/") for line in log if "get " in line)
    for folder in sources:
        facts = read_json(folder / MANIFEST)
        place = f"{folder.parent.name}/{folder.name}/{facts['digest']}"
        counts = {fetched[f"{place}/{name}"] for name in facts["files"]}
        assert counts == {3}, f"{folder}: once by the driver and each node"
    assert not list((run.store / "running").rglob("*")), "no checkpoint is left"
    assert not list(tmp_path.glob("node-*/**/step-*")), "on no node either"
    assert list((run.store / "tensorboard").rglob("events.out.tfevents.*"))


@pytest.mark.long
def test_a_study_goes_on_from_another_head(
    random_llm: Path, bucket: str, go_to: Callable[[str], None], tmp_path: Path
) -> None:
    """It has nothing yet, finds the search, its trials and the twins, and trains nothing."""
    command = [*jobs.SCRIPT, *jobs.TINY, "--backbone", str(random_llm), "--storage", bucket]
    log, results = tmp_path / "log", list[Any]()
    for node in ("node-a", "node-b"):
        go_to(node)
        log.write_text("")
        done = jobs.run(command, seconds=600)
        assert done.returncode == 0, done.stdout + done.stderr
        folder = Path(bucket.removeprefix("objects://"), "studies")
        assert (next(folder.glob("*/report.html"))).exists()
        (path,) = folder.glob("*/results.json")
        results.append(read_json(path))
    assert "continuing the search" in done.stdout
    assert not [line for line in log.read_text().splitlines() if f"put {bucket[10:]}/stage" in line]
    assert results[1]["methods"] == results[0]["methods"]
    assert results[1]["trials"] == results[0]["trials"]
