"""Artifacts at a URI, where nothing can be renamed: whole or absent, fetched once per node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore

from rsllm.errors import CheckpointError, ConfigError
from rsllm.store.artifacts import MANIFEST, Mirror, Store, manifest, write_json

INPUTS = {"seed": 0}


def make(folder: Path) -> None:
    """An artifact of two files, one of them below."""
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "below").mkdir()
    (folder / "below" / "b.txt").write_text("b")


def unmade(folder: Path) -> None:
    pytest.fail("made again")


def objects(bucket: str) -> list[Path]:
    return sorted(p for p in Path(bucket.removeprefix("objects://")).rglob("*") if p.is_file())


def accesses(tmp_path: Path, kind: str) -> list[str]:
    lines = (tmp_path / "log").read_text().splitlines()
    return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(kind)]


@pytest.mark.parametrize("scheme", ["objects", "memory", "file"])
def test_another_node_gets_what_was_made(
    scheme: str, bucket: str, go_to: Callable[[str], None]
) -> None:
    folder = Path(bucket.removeprefix("objects://"))
    folder.mkdir()
    store = Store.open(f"{scheme}://{folder}/")
    first = store.get("kind", INPUTS, make)
    assert first.is_relative_to(os.environ["RSLLM_CACHE"])
    assert Mirror(store.below("kind")).names() == [first.name]
    go_to("node-b")
    second = store.get("kind", INPUTS, unmade)
    assert second.is_relative_to(os.environ["RSLLM_CACHE"])
    assert (second / "a.bin").read_bytes() == bytes(range(256))
    assert (second / "below" / "b.txt").read_text() == "b"
    assert manifest(second, verify=True) == manifest(first)
    assert store.local(f"kind/{second.name}") == store.local(first) == second
    assert [p.name for p in second.parent.iterdir() if p.suffix == ".staging"] == []


def test_the_manifest_is_written_last(bucket: str, tmp_path: Path) -> None:
    Store.open(bucket).get("kind", INPUTS, make)
    assert [Path(path).name for path in accesses(tmp_path, "put")] == ["a.bin", "b.txt", MANIFEST]


def fail_at_manifest(self: ObjectStore, path1: Any, path2: Any, **options: Any) -> None:
    raise OSError("the connection was reset")


def test_an_upload_that_fails_leaves_no_artifact(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(bucket)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_file", fail_at_manifest)
        with pytest.raises(CheckpointError, match=r"bucket cannot be used: the connection was"):
            store.get("kind", INPUTS, make)
    assert not store.holds(store.path("kind", INPUTS))
    assert store.get("kind", INPUTS, make).is_dir()


def test_a_maker_killed_before_the_manifest_leaves_no_artifact(
    bucket: str, go_to: Callable[[str], None]
) -> None:
    code = (
        "import os, sys; from object_store import ObjectStore\n"
        "from rsllm.store.artifacts import Store\n"
        "put = ObjectStore.put_file\n"
        "def killed(self, path1, path2, **options):\n"
        "    path2.endswith('manifest.json') and os._exit(9)\n"
        "    put(self, path1, path2, **options)\n"
        "ObjectStore.put_file = killed\n"
        "Store.open(sys.argv[1]).get('kind', {'seed': 0}, lambda f: (f / 'a').write_text('a'))"
    )
    assert subprocess.run([sys.executable, "-c", code, bucket]).returncode == 9
    assert [path.name for path in objects(bucket)] == ["a"]
    store = Store.open(bucket)
    assert not store.holds(store.path("kind", INPUTS))
    assert Mirror(store.below("kind")).names() == []
    store.get("kind", INPUTS, make)
    go_to("node-b")
    assert (store.get("kind", INPUTS, unmade) / "a.bin").exists()


@pytest.mark.parametrize("file", ["a.bin", "b.txt", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_at_the_uri_is_found_and_named(
    file: str, damage: str, bucket: str, go_to: Callable[[str], None]
) -> None:
    store = Store.open(bucket)
    name = store.name(store.get("kind", INPUTS, make))
    (path,) = (path for path in objects(bucket) if path.name == file)
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    go_to("node-b")
    if (file, damage) == (MANIFEST, "remove"):
        assert not store.holds(store.root / name)
        return
    with pytest.raises(CheckpointError, match=bucket):
        store.get("kind", INPUTS, unmade)
    assert not (store.root / name).exists()


def test_a_name_that_leads_out_of_the_folder_is_refused(
    bucket: str, go_to: Callable[[str], None], tmp_path: Path
) -> None:
    store = Store.open(bucket)
    name = store.name(store.get("kind", INPUTS, make))
    path = Path(bucket.removeprefix("objects://")) / name / MANIFEST
    write_json(path, {"files": {"../../../escaped": {"bytes": 1, "sha256": "0" * 64}}})
    go_to("node-b")
    with pytest.raises(CheckpointError, match="is no place for a file"):
        store.local(name)
    assert not list(tmp_path.rglob("escaped"))


def test_two_makers_at_once_do_not_mix_their_files(
    bucket: str, go_to: Callable[[str], None]
) -> None:
    """Each takes its own time, and its files differ, as a training's clock does."""
    store = Store.open(bucket)
    with store.commit("kind", INPUTS) as slow:
        (slow / "a.bin").write_bytes(b"slow")
        (slow / "b.bin").write_bytes(b"slow")
        go_to("node-b")
        with store.commit("kind", INPUTS) as fast:
            (fast / "a.bin").write_bytes(b"fast")
        go_to("node-c")
        assert (store.get("kind", INPUTS, unmade) / "a.bin").read_bytes() == b"fast"
        go_to("node-a")
    go_to("node-d")
    fetched = store.get("kind", INPUTS, unmade)
    assert {path.read_bytes() for path in fetched.glob("*.bin")} == {b"slow"}


def test_a_node_fetches_an_artifact_once(
    bucket: str, go_to: Callable[[str], None], tmp_path: Path
) -> None:
    store = Store.open(bucket)
    name = store.name(store.get("kind", INPUTS, make))
    code = "import sys; from rsllm.store.artifacts import Store\n"
    code += "print(Store(sys.argv[1]).local(sys.argv[2]))"
    command = [sys.executable, "-c", code, bucket, name]
    for node in ("node-b", "node-c"):
        go_to(node)
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        assert {worker.communicate()[0].strip() for worker in workers} == {str(store.root / name)}
    counts = Counter(Path(path).name for path in accesses(tmp_path, "get"))
    assert counts == {"a.bin": 2, "b.txt": 2}


def test_a_folder_that_a_node_does_not_see_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"data/0 is not on storage that .* or a URI"):
        store.local("data/0")


@pytest.mark.parametrize(("uri", "package"), [("s3://b/p", "s3fs"), ("gs://b/p", "gcsfs")])
def test_a_missing_driver_is_named(uri: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=f"{uri} cannot be used.*nstall {package}.*--storage"):
        Store.open(uri)


def test_a_uri_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing cannot be used: .*--storage"):
        Store.open(f"file://{tmp_path}/missing")


def test_what_is_removed_is_gone_manifest_first(
    bucket: str, go_to: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(bucket)
    path = store.get("kind", INPUTS, make)
    removed: list[str] = []
    remove = ObjectStore.rm

    def note(self: ObjectStore, path: Any, **options: Any) -> None:
        removed.append(Path(path).name)
        remove(self, path, **options)

    monkeypatch.setattr(ObjectStore, "rm", note)
    store.remove(store.name(path))
    assert removed == [MANIFEST, path.name]
    assert not path.exists()
    assert objects(bucket) == []
    assert not store.holds(path)


def test_reports_are_shared_as_they_are(bucket: str) -> None:
    store = Store.open(bucket)
    folder = store.root / "studies" / "one"
    folder.mkdir(parents=True)
    write_json(folder / "results.json", {"MRR": 0.5})
    store.share("studies/one")
    (path,) = objects(bucket)
    assert path.relative_to(bucket.removeprefix("objects://")) == Path("studies/one/results.json")
    assert path.read_bytes() == (folder / "results.json").read_bytes()
