"""The doctor: a machine that is well, and one real cause for everything that it finds wrong."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rsllm import doctor
from rsllm.doctor import Check, examine, report
from rsllm.errors import RsllmError

COMMAND = [sys.executable, "-c", "import sys, rsllm.cli as cli; sys.exit(cli.main())", "doctor"]
NODE = {
    "NodeManagerHostname": "here",
    "Resources": {"CPU": 2.0, "memory": 8.0 * 2**30, "object_store_memory": 1024.0},
}


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {name: verdict for name, _, verdict, _ in checks}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As another user, if this one may write everywhere."""
    own = os.geteuid()
    if not own:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


def install(folder: Path, name: str, version: str, *needs: str) -> None:
    """Put a package's metadata where Python looks first."""
    facts = folder / f"{name}-{version}.dist-info"
    facts.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (facts / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.mark.ray
def test_all_is_well_here(ray_cluster: str, tmp_path: Path, capsys: Any) -> None:
    checks = [*examine(tmp_path / "store")]
    assert "fail" not in verdicts(checks).values(), checks
    report(checks)
    shown = capsys.readouterr().out
    for part in ("storage", "cache", "token", "dashboard", "size", "/dev/shm", "folders", "CUDA"):
        assert part in shown
    assert checks[-1][1].startswith("2 workers, 4 MiB summed in ")
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.ray
def test_nodes_that_do_not_answer_in_time(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "WAIT_SECONDS", 0.001)
    last = [*examine(tmp_path)][-2:]
    assert [check[2] for check in last] == ["fail", "fail"]
    assert "timed out" in last[0][1]


def test_a_bucket_is_reached_as_one(bucket: str) -> None:
    found = [*doctor._attempt("storage", "choose another", partial(doctor._look_at_uri, bucket))]
    assert verdicts(found) == {"storage": "ok"}
    unknown = partial(doctor._look_at_uri, "nowhere://bucket")
    assert verdicts([*doctor._attempt("storage", "choose another", unknown)]) == {"storage": "fail"}


def test_a_backbone_is_looked_at(random_llm: Path, tmp_path: Path) -> None:
    look = partial(doctor._look_at_backbone, str(random_llm))
    ((_, finding, verdict, _),) = doctor._attempt("backbone", "see there", look)
    assert (finding[:17], verdict) == ("llama, 2 layers, ", "ok")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    look = partial(doctor._look_at_backbone, str(tmp_path))
    ((_, finding, verdict, _),) = doctor._attempt("backbone", "see there", look)
    assert verdict == "fail"
    assert finding.endswith("is a Git LFS pointer, not its content; run git lfs pull")


def test_a_library_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "transformers", "4.40.0")
    monkeypatch.syspath_prepend(tmp_path)
    ((_, finding, verdict, remedy),) = doctor._look_at_versions("versions")
    assert (finding, verdict) == ("transformers 4.40.0", "fail")
    assert remedy.startswith("pip install 'transformers>=")


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "rsllm", "9.0", "rsllm-nowhere>=1", "rsllm-extra; extra == 'dev'")
    monkeypatch.syspath_prepend(tmp_path)
    checks = [*doctor._attempt("versions", "", partial(doctor._look_at_versions, "versions"))]
    assert verdicts(checks) == {"versions": "fail"}
    assert "rsllm-nowhere" in checks[0][1]


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir(mode=0o500)
    with without_rights():
        look = partial(doctor._look_at_folder, "storage", store)
        ((_, finding, verdict, _),) = doctor._attempt("storage", "choose another", look)
    assert verdict == "fail"
    assert f"storage {store} cannot be written (Permission denied)" in finding


def test_a_token_that_others_read_and_a_dashboard_that_others_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    well = {"token": "ok", "token file": "ok", "dashboard": "ok"}
    assert verdicts(doctor._look_at_access("http://127.0.0.1:9")) == well
    file.chmod(0o644)
    found = doctor._look_at_access("http://0.0.0.0:9")
    assert verdicts(found) == {"token": "ok", "token file": "fail", "dashboard": "warn"}
    assert found[1][3] == f"chmod 600 {file}"


def test_a_node_unlike_the_driver(tmp_path: Path) -> None:
    """Other versions, a folder of its own, a small /dev/shm, and a GPU that PyTorch cannot use."""
    versions = doctor._look_at_versions("versions")[0][1]
    assert set(verdicts(doctor._look_around(NODE, versions, [str(tmp_path)])).values()) == {"ok"}
    has = {"GPU": 64.0, "memory": 1.0 * 2**30, "object_store_memory": 2.0**60}
    node = {**NODE, "Resources": has}
    found = doctor._look_around(node, "torch 1.0", [str(tmp_path / "of the driver")])
    assert verdicts(found) == {
        "here size": "warn",
        "here CUDA": "fail",
        "here versions": "fail",
        "here folders": "fail",
        "here /dev/shm": "warn",
    }


def test_a_ray_that_would_ask_for_no_token(tmp_path: Path) -> None:
    """The command: a table that goes on after each failure, one error, exit code 1."""
    (tmp_path / "file").touch()
    own = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*COMMAND, "--storage", str(tmp_path / "file" / "store")],
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Not a directory" in done.stdout
    assert "RAY_AUTH_MODE is disabled" in done.stdout
    assert "rsllm: error: 2 of 4 checks failed: storage, ray" in done.stderr
    assert "Traceback" not in done.stderr


def test_failures_are_named() -> None:
    checks = [("a", "x", "ok", ""), ("b", "y", "warn", "z"), ("c", "y", "fail", "z")]
    report(checks[:2])
    with pytest.raises(RsllmError, match="1 of 3 checks failed: c"):
        report(checks)
