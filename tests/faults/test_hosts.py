"""One worker per host, on two hosts that are network namespaces, against two workers on one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from driver import CLUSTER
from fault_runs import Run
from hosts import LINK, join, may_make_networks, namespace

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.timeout(1200)]
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6397
HOSTS = {"a": "10.81.0.1", "b": "10.81.0.2"}


def inside(space: str, command: list[str]) -> list[str]:
    """The command on that host: its network, and a folder for Ray that the other does not see."""
    script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    folder = os.environ["RAY_TMPDIR"] + "/ray"
    own = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", folder]
    return ["ip", "netns", "exec", space, *own, *command]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, list[str]]]:
    """The address of a Ray over both hosts, and what puts a command on the first one."""
    if reason := may_make_networks():
        pytest.skip(reason)
    os.makedirs(os.environ["RAY_TMPDIR"] + "/ray", exist_ok=True)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": LINK}
    with ExitStack() as stack:
        spaces = {name: stack.enter_context(namespace(name)) for name in HOSTS}
        join({HOSTS[name]: space for name, space in spaces.items()})
        jobs = {}
        for name, space in spaces.items():
            head = ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1"]
            where = head if name == "a" else [f"--address={HOSTS['a']}:{PORT}"]
            start = [RAY, "start", *where, f"--node-ip-address={HOSTS[name]}", "--num-cpus=2"]
            jobs[name] = subprocess.Popen(
                inside(space, [*start, "--block"]), env=environment, stdout=subprocess.DEVNULL
            )
            stack.callback(jobs[name].kill)
            time.sleep(10)
        first = ["nsenter", f"--target={jobs['a'].pid}", "--net", "--mount"]
        yield f"{HOSTS['a']}:{PORT}", first


@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_train_what_one_does(
    make_run: Callable[..., Run],
    uninterrupted: Run,
    sharded: Run,
    hosts: tuple[str, list[str]],
    stage: int,
) -> None:
    address, prefix = hosts
    settings = {"compute.placement": "spread", "compute.zero_stage": stage}
    run = make_run(settings=settings, environment={CLUSTER: address}, prefix=prefix)
    done = run.finish()
    assert done.returncode == 0, done.stdout
    assert run.weights_differ({2: uninterrupted, 3: sharded}[stage]) < 1e-6
