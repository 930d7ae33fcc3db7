"""`ray job submit` runs the main job unchanged on a cluster that `ray start` made.

Starts a head of its own on free ports and stops nothing else; asked for by RSLLM_TEST_JOBS=1.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jobs
import psutil
import pytest

pytestmark = [
    pytest.mark.skipif(os.environ.get("RSLLM_TEST_JOBS") != "1", reason="needs RSLLM_TEST_JOBS=1"),
    pytest.mark.timeout(900),
]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A head node: its job server, and the environment that may talk to it."""

    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [open_socket.getsockname()[1] for open_socket in sockets]
    for open_socket in sockets:
        open_socket.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard, agent, client = free_ports(4)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": ""}
    environment = jobs.environment() | token
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        options = {
            "port": port,
            "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "num-cpus": 2,
            "object-store-memory": 300 * 1024**2,
            "temp-dir": folder,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        command = [RAY, "start", "--head", "--block", *flags]
        with (Path(folder) / "head.log").open("wb") as log:
            node = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for(dashboard, node)
            yield Head(f"http://127.0.0.1:{dashboard}", environment)
        finally:
            stop(node)


def wait_for(port: int, node: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while node.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.5)
    pytest.fail("the head did not start")


def stop(node: subprocess.Popen[bytes]) -> None:
    """End the node and what it started, by process id."""
    started = psutil.Process(node.pid).children(recursive=True)
    node.terminate()
    _, alive = psutil.wait_procs([psutil.Process(node.pid), *started], timeout=30)
    for process in alive:
        process.kill()
    node.wait()


def submit(head: Head, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    flags = ["--address", head.address, "--working-dir", "experiments"]
    return subprocess.run(
        [RAY, "job", "submit", *flags, "--", *entrypoint],
        cwd=jobs.ROOT,
        env=head.environment,
        timeout=600,
        capture_output=True,
        text=True,
    )


def test_submitted_job_runs_the_same_script(head: Head, tiny_llm: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    flags = [*jobs.TINY, "--backbone", str(tiny_llm), "--storage", str(store)]
    done = submit(head, sys.executable, "tune_loss_weights.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Ray dashboard: {head.address}" in done.stdout
    (folder,) = (store / "studies").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "trials.csv", "report.html"} <= names


def test_submitted_job_fails_with_the_users_mistake(head: Head, tmp_path: Path) -> None:
    store = ["--storage", str(tmp_path / "store")]
    done = submit(head, sys.executable, "tune_loss_weights.py", "--data", "movies", *store)
    assert done.returncode != 0
    assert "rsllm: error: no asset is called 'movies'" in done.stdout + done.stderr


def test_stranger_without_the_token_is_refused(head: Head) -> None:
    stranger = {**head.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = submit(Head(head.address, stranger), "true")
    assert done.returncode != 0
