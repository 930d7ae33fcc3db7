"""Artifacts are committed whole or not at all, checked, and made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rsllm
from rsllm.errors import CheckpointError, ConfigError
from rsllm.store.artifacts import (
    MANIFEST,
    Store,
    commit_dir,
    manifest,
    read_json,
    sha256,
    write_json,
)


def commit(folder: Path) -> Path:
    """A committed folder of two files, one of them below."""
    with commit_dir(folder, kind="test") as staging:
        (staging / "a.bin").write_bytes(bytes(range(256)))
        (staging / "below").mkdir()
        (staging / "below" / "b.txt").write_text("b")
        assert not folder.exists()
    return folder


def test_a_committed_folder_has_its_facts_and_hashes(tmp_path: Path) -> None:
    facts = manifest(commit(tmp_path / "new" / "run"), verify=True)
    assert facts["kind"] == "test"
    assert set(facts["files"]) == {"a.bin", "below/b.txt"}
    known = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"
    assert facts["files"]["below/b.txt"] == {"bytes": 1, "sha256": known}
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "run"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with commit_dir(tmp_path / "run") as staging:
            (staging / "a.bin").write_bytes(b"a")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_final_folder_and_is_cleaned_up(tmp_path: Path) -> None:
    """Beside one that still writes the same folder, and another folder's."""
    code = (
        "import pathlib, sys\n"
        "from rsllm.store.artifacts import commit_dir\n"
        "with commit_dir(pathlib.Path(sys.argv[1])) as staging:\n"
        "    (staging / 'a.bin').write_bytes(b'a')\n"
        "    print(staging.name, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    names, writers = ("run", "run", "other"), []
    for name in names:
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        writers.append(subprocess.Popen(command, **pipes))  # type: ignore[call-overload]
    killed, alive, other = (writer.stdout.readline().strip() for writer in writers)
    for writer in (writers[0], writers[2]):
        writer.kill()
        writer.communicate()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([killed, alive, other])
    assert manifest(commit(tmp_path / "run"), verify=True)["kind"] == "test", "the next one can"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run", alive, other])
    writers[1].communicate("")
    assert writers[1].returncode == 0


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    with commit_dir(tmp_path / "run") as staging:
        (staging / "a.bin").write_bytes(b"second")
        commit(tmp_path / "run")
    assert manifest(tmp_path / "run", verify=True)["kind"] == "test"
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def truncate(folder: Path) -> None:
    os.truncate(folder / "a.bin", 255)


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / "a.bin").read_bytes())
    content[100] ^= 1
    (folder / "a.bin").write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "a.bin").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_bit, remove])
def test_damage_is_found(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = commit(tmp_path / "run")
    damage(folder)
    with pytest.raises(CheckpointError, match=r"is damaged: a\.bin .*delete it to rebuild"):
        manifest(folder, verify=True)


def test_a_missing_or_broken_manifest_is_refused(tmp_path: Path) -> None:
    folder = commit(tmp_path / "run")
    os.truncate(folder / MANIFEST, 20)
    with pytest.raises(CheckpointError, match="cannot read"):
        manifest(folder)
    with pytest.raises(CheckpointError, match="cannot read"):
        manifest(tmp_path)


def test_json_survives_a_refused_value(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"b": [1, 2], "a": 0.1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == json.loads(path.read_text()) == {"a": 0.1, "b": [1, 2]}


def test_an_artifact_is_made_once_per_inputs(tmp_path: Path) -> None:
    store, made = Store.open(tmp_path / "store"), []

    def make(staging: Path) -> None:
        made.append(staging)
        (staging / "a.bin").write_bytes(b"a")

    first = store.get("data", {"seed": 0, "rows": 5}, make)
    assert store.get("data", {"rows": 5, "seed": 0}, make) == first
    assert Store.open(tmp_path / "store").get("data", {"rows": 5, "seed": 0}, make) == first
    assert len(made) == 1
    assert store.get("data", {"seed": 1, "rows": 5}, make) != first
    assert store.get("model", {"seed": 0, "rows": 5}, make) != first
    assert len(made) == 3
    facts = manifest(first, verify=True)
    assert facts["inputs"] == {"seed": 0, "rows": 5}
    assert facts["provenance"]["rsllm"] == rsllm.__version__
    assert sha256(first / "a.bin") == facts["files"]["a.bin"]["sha256"]


def test_a_failed_artifact_is_made_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with pytest.raises(ZeroDivisionError):
        store.get("data", 0, lambda staging: 1 / 0)
    assert not store.path("data", 0).exists()
    path = store.get("data", 0, lambda staging: (staging / "a.bin").write_bytes(b"a"))
    assert (path / "a.bin").read_bytes() == b"a"


def test_a_damaged_artifact_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    path = store.get("data", 0, lambda staging: (staging / "a.bin").write_bytes(b"aa"))
    os.truncate(path / "a.bin", 1)
    with pytest.raises(CheckpointError, match="delete it to rebuild"):
        store.get("data", 0, lambda staging: None)


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/store cannot be written .*--storage"):
        Store.open(tmp_path / "file" / "store")


def test_work_is_done_by_one_process_and_the_other_is_told(tmp_path: Path) -> None:
    code = (
        "import sys, time; from rsllm.store.artifacts import Store\n"
        f"with Store.open({str(tmp_path)!r}).lock('study', wait=False):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    store = Store.open(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(ConfigError, match=f"process {other.pid} on .* runs study already"),
            store.lock("study", wait=False),
        ):
            pass
        other.kill()
    with store.lock("study", wait=False):
        pass


def test_an_artifact_that_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    code = (
        "import time; from rsllm.store.artifacts import Store\n"
        "def make(folder):\n"
        "    print('making', flush=True); time.sleep(1); (folder / 'made').write_text('there')\n"
        f"Store.open({str(tmp_path)!r}).get('kind', [], make)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"making\n"
        path = Store.open(tmp_path).get("kind", [], lambda folder: pytest.fail("made twice"))
    assert (path / "made").read_text() == "there"
