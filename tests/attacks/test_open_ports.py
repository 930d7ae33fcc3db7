"""A Ray that rsllm starts asks everyone for the token, and the token stays with its owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import rsllm

SECRET = "a-token-that-nobody-may-see"
DROPPED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS")


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    """The script as a user of `home` would run it, on a Ray of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    own = {"HOME": str(home), "RAY_TMPDIR": str(home / "ray"), "RAY_ADDRESS": "local"}
    own |= {"PYTHONPATH": str(Path(rsllm.__file__).parents[1]), "HF_TOKEN": SECRET}
    command = [sys.executable, str(Path(__file__).with_name("open_ports.py")), str(home), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=kept | own, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def outputs() -> Iterator[dict[str, tuple[Path, str, str]]]:
    """Home, output and errors of both ways, which run side by side."""
    # pytest's own folders have paths that are too long for Ray's sockets.
    place = partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)  # Ray may still write
    with place() as own, place() as disabled:
        yield run_both({"own": Path(own), "disabled": Path(disabled)})


def run_both(homes: dict[str, Path]) -> dict[str, tuple[Path, str, str]]:
    (homes["own"] / ".ray").mkdir()
    (homes["own"] / ".ray" / "auth_token").touch(0o644)
    running = {"own": start(homes["own"]), "disabled": start(homes["disabled"], "disabled")}
    found = {}
    for name, process in running.items():
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        found[name] = (homes[name], out, errors)
    return found


@pytest.mark.ray
def test_nobody_gets_in_without_the_token(outputs: dict[str, tuple[Path, str, str]]) -> None:
    home, out, errors = outputs["own"]
    found = json.loads(out.splitlines()[-1])
    assert found["mode"] == "0o600"
    assert found["routes"] == [401] * 5
    assert (found["wrong token"], found["job"]) == (403, 401)
    # gRPC listens on all interfaces: every service that is there refuses.
    assert len(found["grpc"]) >= 5
    assert all("UNAUTHENTICATED" in answers for answers in found["grpc"].values()), found["grpc"]
    assert {"UNAUTHENTICATED", "UNIMPLEMENTED"} >= {a for s in found["grpc"].values() for a in s}
    # HTTP: the dashboard is on loopback, and only numbers for Prometheus need no token.
    dashboard = found["dashboard"].removeprefix("http://")
    assert dashboard.startswith("127.0.0.1:")
    open_pages = [text for status, text in found["http"].values() if status != 401]
    assert found["http"].pop(dashboard)[0] == 401
    assert set(open_pages) <= {"# HELP"}
    token = (home / ".ray" / "auth_token").read_text()
    assert len(token) == 64
    logs = [p for p in (home / "ray").rglob("*") if p.is_file() and not p.is_symlink()]
    assert len(logs) > 10
    # The output holds the command line of every process, which all users of the machine can see.
    assert any("gcs_server" in line for line in found["command lines"])
    texts = [path.read_bytes() for path in logs] + [out.encode(), errors.encode()]
    for secret in (token, SECRET):
        assert not [text for text in texts if secret.encode() in text]
    assert "asks for no token" not in errors


@pytest.mark.ray
def test_joining_an_open_cluster_is_warned_of(outputs: dict[str, tuple[Path, str, str]]) -> None:
    _, out, errors = outputs["disabled"]
    assert errors.count("rsllm: warning: this Ray asks for no token") == 1
    failed = [check for check in json.loads(out.splitlines()[-1]) if check[2] == "fail"]
    assert [check[:2] for check in failed] == [["token", "asked for: False"]]


def test_rsllm_starts_no_open_cluster(tmp_path: Path) -> None:
    """Whatever the user's environment says."""
    code = "from rsllm.cli import run_script; from rsllm.compute.start import start_ray\n"
    code += "run_script(start_ray)"
    own = {"HOME": str(tmp_path), "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "Disabled"}
    own["PYTHONPATH"] = str(Path(rsllm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "rsllm: error: RAY_AUTH_MODE is disabled" in done.stderr
    assert list(tmp_path.iterdir()) == []
