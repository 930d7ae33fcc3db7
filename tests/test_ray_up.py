"""`ray up` to `ray down` with cluster/local.yaml, over ssh, on one host and on two.

Only the hosts' addresses, the user and the key are the test's. Asked for by `-m hosts`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hosts
import jobs
import pytest
import yaml

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]
RAY = str(Path(sys.executable).with_name("ray"))
ADDRESSES = {"alpha": "10.82.0.1", "beta": "10.82.0.2"}


@dataclass(frozen=True)
class Cluster:
    """A cluster file, and its hosts. It is used from the first, the head, as if from elsewhere."""

    file: Path
    hosts: list[hosts.Host]
    seconds: dict[str, float] = field(default_factory=dict)

    def ray(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray VERB FILE WORDS`, as typed in the repository's root; its seconds are kept."""
        start = time.monotonic()
        yes = ["-y"] if verb in ("up", "down") else []
        done = self.run([RAY, verb, *yes, str(self.file), *words])
        self.seconds[verb] = round(time.monotonic() - start, 1)
        print(f"ray {verb} {' '.join(words)[:60]}: {self.seconds[verb]} s\n{done.stdout[-6000:]}")
        return done

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.hosts[0].command(["env", f"--chdir={jobs.ROOT}", *words]),
            env=self.hosts[0].environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )


@pytest.fixture(params=[1, 2], ids=["one host", "two hosts"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    if reason := hosts.may_serve_ssh():
        pytest.skip(reason)
    key = tmp_path / "key"
    hosts.make_key(key)
    config: dict[str, Any] = yaml.safe_load((jobs.ROOT / "cluster/local.yaml").read_text())
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    with ExitStack() as stack:
        names = list(ADDRESSES)[: request.param]
        spaces = {name: stack.enter_context(hosts.namespace(name)) for name in names}
        if request.param == 2:
            hosts.join({ADDRESSES[name]: space for name, space in spaces.items()})
            head, worker = ADDRESSES.values()
            config["provider"] |= {"head_ip": head, "worker_ips": [worker]}
        made = [
            stack.enter_context(hosts.host(name, space, tmp_path / name, key))
            for name, space in spaces.items()
        ]
        file = tmp_path / "local.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        yield Cluster(file, made)


def test_from_ray_up_to_ray_down(cluster: Cluster, random_llm: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    token = cluster.run(["sh", "-c", f"umask 077; {RAY} get-auth-token --generate"])
    assert token.returncode == 0, token.stdout
    assert cluster.ray("up").returncode == 0
    workers = len(yaml.safe_load(cluster.file.read_text())["provider"]["worker_ips"])
    wait_for_nodes(cluster, 1 + workers)
    doctor = f"RSLLM_CACHE={tmp_path}/cache rsllm doctor --storage"
    assert cluster.ray("exec", f"{doctor} {store}").returncode == 0
    own = cluster.ray("exec", f"{doctor} /run/sshd/store")
    assert (own.returncode, own.stdout.count("beta folders")) == ((1, 2) if workers else (0, 0))

    flags = [*jobs.SMALL, "--trials", "1", "--set", "stage1.samples=0"]
    flags += ["--backbone", str(random_llm), "--storage", str(store)]
    if workers:
        flags += ["--set", "compute.workers=2", "--set", "compute.placement=spread"]
    done = cluster.ray("submit", "experiments/tune_loss_weights.py", "--", *flags)
    assert done.returncode == 0
    assert "Ray dashboard: http://127.0.0.1:8265" in done.stdout
    (study,) = (store / "studies").iterdir()
    assert {"results.json", "trials.csv", "report.html"} <= {path.name for path in study.iterdir()}

    assert cluster.ray("down").returncode == 0
    deadline = time.monotonic() + 120
    while any(host.runs("raylet") for host in cluster.hosts):
        assert time.monotonic() < deadline, "a Ray outlived its cluster"
        time.sleep(2)


def wait_for_nodes(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + 300
    while True:
        done = cluster.ray("exec", "ray status")
        if f"/{count * (os.cpu_count() or 1)}.0 CPU" in done.stdout:
            return
        assert time.monotonic() < deadline, done.stdout
        time.sleep(5)
