"""The files for `ray up`: valid for the installed Ray, authenticated, closed to the network."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import yaml
from ray._private.utils import write_ray_address

from rsllm.compute import start
from rsllm.errors import ConfigError

CLUSTER = Path(__file__).parents[1] / "cluster"
FILES = [CLUSTER / name for name in ("gpu.yaml", "local.yaml")]
COMMANDS = (
    "setup_commands",
    "head_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
TOKEN = "~/.ray/auth_token"


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


@pytest.fixture
def config(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def validate(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def commands(config: dict[str, Any]) -> list[str]:
    return [command for section in COMMANDS for command in config.get(section, [])]


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    validate(config)
    with pytest.raises(Exception, match="workers_max"):
        validate({**config, "workers_max": 3})


def test_token_authentication_is_on_for_head_and_workers(config: dict[str, Any]) -> None:
    starts = [command for command in commands(config) if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert config["file_mounts"][TOKEN] == TOKEN
    assert config["setup_commands"][0] == f"chmod 600 {TOKEN}"


def test_dashboard_is_on_loopback(config: dict[str, Any], path: Path) -> None:
    heads = [command for command in commands(config) if "ray start --head" in command]
    assert [command.count("--dashboard-host=127.0.0.1") for command in heads] == [1]
    assert "0.0.0.0" not in path.read_text()


def test_commands_survive_yaml_and_bash(config: dict[str, Any], path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not [line for line in lines if " #" in line]
    for command in commands(config):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_mounted_sources_are_in_the_repository(config: dict[str, Any]) -> None:
    sources = {local for remote, local in config["file_mounts"].items() if remote != TOKEN}
    assert sources >= {"rsllm", "pyproject.toml"}
    assert all((CLUSTER.parent / source).exists() for source in sources)


def test_setup_puts_rsllm_on_the_login_path_once(config: dict[str, Any], tmp_path: Path) -> None:
    (command,) = [command for command in config["setup_commands"] if ".bashrc" in command]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    shell = 'source ~/.bashrc; echo "${PATH%%:*}" "$RAY_AUTH_MODE"'
    output = subprocess.run(
        ["bash", "-c", shell], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert output.split() == [f"{tmp_path}/.rsllm/venv/bin", "token"]


def test_one_gpu_is_there_from_the_start_and_the_head_is_on_demand() -> None:
    config = yaml.safe_load((CLUSTER / "gpu.yaml").read_text())
    types = config["available_node_types"]
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
    assert 1 <= types["gpu"]["min_workers"] < types["gpu"]["max_workers"]


def start_ray(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from rsllm.cli import run_script; from rsllm.compute.start import start_ray\n"
    code += "run_script(start_ray)"
    own = {"RAY_TMPDIR": str(tmp_path), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True)


@pytest.mark.ray
def test_a_ray_that_was_killed_is_not_joined() -> None:
    """It cannot take back where it said that it listens. That needs no cache folder."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are too long for sockets
        os.mkdir(folder + "/ray")
        write_ray_address("192.0.2.1:1", folder + "/ray")
        done = start_ray(Path(folder), RAY_ADDRESS="", RSLLM_CACHE="/dev/null/cache")
    assert done.returncode == 0, done.stderr
    assert "rsllm: the Ray at 192.0.2.1:1 is gone; starting one here\n" in done.stdout + done.stderr


def test_nothing_answers_at_the_users_address(tmp_path: Path) -> None:
    done = start_ray(tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.startswith("rsllm: error: no Ray answers at RAY_ADDRESS=127.0.0.1:1; start")


def test_gpus_are_asked_for_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they go again when idle, a plan would otherwise find none."""
    asked: list[list[dict[str, int]]] = []
    there = iter([{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}])
    note = lambda bundles: asked.append(bundles)  # noqa: E731
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", note)
    monkeypatch.setattr("ray.cluster_resources", lambda: next(there))
    monkeypatch.setattr(start, "GPU_POLL_SECONDS", 0.0)
    start._wait_for_gpus.__wrapped__("2")
    assert asked == [[{"GPU": 1}] * 2, []], "once they work they need no request"
    assert "rsllm: 1 of 2 GPUs are there" in capsys.readouterr().err

    monkeypatch.setattr(start, "GPU_SECONDS", -1.0)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1.0})
    start._wait_for_gpus.__wrapped__("2")  # one of them is better than none
    monkeypatch.setattr("ray.cluster_resources", dict)
    with pytest.raises(ConfigError, match="RSLLM_GPUS=2, but none came"):
        start._wait_for_gpus.__wrapped__("2")
    assert asked[-1] == []
    with pytest.raises(ConfigError, match="RSLLM_GPUS=many is no number of GPUs"):
        start._wait_for_gpus.__wrapped__("many")


@pytest.fixture
def autoscaled() -> Iterator[dict[str, str]]:
    """The environment of a head without GPUs whose autoscaler starts nodes with one beside it.

    Ray's own provider of such nodes has them join at port 6379, whatever the head's is.
    """
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 6379), timeout=5):
        pytest.skip("something listens on port 6379")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = {"RAY_TMPDIR": folder, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--num-gpus=0"]
        command += ["--port=6379", "--num-cpus=1", "--include-dashboard=false"]
        command += [f"--autoscaling-config={Path(__file__).with_name('autoscaled.yaml')}"]
        try:
            subprocess.run(command, env=os.environ | own, check=True, capture_output=True)
            yield {**own, "RAY_ADDRESS": "127.0.0.1:6379"}
        finally:
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("RAY_TMPDIR") == folder:
                        process.kill()


@pytest.mark.ray
def test_an_autoscaler_brings_the_gpus(autoscaled: dict[str, str]) -> None:
    code = (
        "from rsllm.cli import run_script\n"
        "from rsllm.compute.start import cluster_resources, start_ray\n"
        "run_script(lambda: (start_ray(), print(cluster_resources())))"
    )
    environment = os.environ | autoscaled | {"RSLLM_GPUS": "2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "rsllm: 0 of 2 GPUs are there; the autoscaler brings the others" in done.stderr
    assert "gpus=2.0, nodes=2" in done.stdout


def test_the_address_is_not_that_of_a_dashboard(tmp_path: Path) -> None:
    """Users of `ray job` have that one in their environment."""
    done = start_ray(tmp_path, RAY_ADDRESS="http://127.0.0.1:8265")
    assert done.returncode == 2
    assert done.stderr == (
        "rsllm: error: RAY_ADDRESS=http://127.0.0.1:8265 is not HOST:PORT of a Ray; unset it here\n"
    )


def test_a_ray_of_another_version_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0")

    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(start, "_running_ray", lambda: "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"at 10.0.0.1:6379 cannot be joined: .*Ray: 2\.1\.0"):
        start.start_ray()
    monkeypatch.setattr(start, "_running_ray", lambda: None)
    with pytest.raises(RuntimeError, match="Version mismatch"):
        start.start_ray()

    for said, advice in (
        ("The current node timed out during startup. This could happen", "machine is too busy"),
        ("bind on address ('127.0.0.1', 8265): address already in use", "took port [0-9]+, on"),
    ):
        monkeypatch.setattr(ray, "init", Mock(side_effect=Exception(said)))
        with pytest.raises(ConfigError, match=advice):
            start.start_ray()


def test_the_dashboard_has_a_port_that_ray_gives_to_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system hands out those from 32768 on, unless it is told otherwise, and Ray its own."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(start, "DASHBOARD_PORT", port)
        assert 19999 < start._free_port() < 32768
        monkeypatch.setattr(start, "OTHER_PORTS", range(port, port + 1))
        with pytest.raises(ConfigError, match=r"no port of range.* end what listens there"):
            start._free_port()


@pytest.mark.ray
def test_dashboard_refuses_requests_without_the_token(ray_cluster: str) -> None:
    from ray.job_submission import JobSubmissionClient

    for route in ("/api/version", "/api/jobs/"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(ray_cluster + route, timeout=10)
        assert refused.value.code in (401, 403)
    assert JobSubmissionClient(ray_cluster).list_jobs()[0].job_id, "with the token: this driver"
