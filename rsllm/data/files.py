"""Raw files wherever fsspec reaches: a local folder, a bucket, the inside of an archive."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import IO, Any, Literal

import fsspec

from rsllm.config import TimeUnit

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

Format = Literal["delimited", "json", "parquet"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """How the rows of a raw table stand in its files.

    Attributes:
        files: name of its file, or a glob, below the source's folder.
        columns: the column of each role (user, item, time, rating, title, split, text...).
        separator: between fields; empty for JSON lines and Parquet, which the suffix tells.
        header: the columns' names where the file does not say them in its first line.
        quoting: whether fields may stand in double quotes.
        encoding: of the text.
        time_unit: of the time column.
        max_rating: a rating must lie between 0 and this; infinite: any number.
    """

    files: str
    columns: Mapping[str, str]
    separator: str = ""
    header: tuple[str, ...] = ()
    quoting: bool = False
    encoding: str = "utf-8"
    time_unit: TimeUnit = "seconds"
    max_rating: float = math.inf


@dataclass(frozen=True)
class File:
    """A raw file on some file system."""

    system: Any
    path: str
    name: str
    """Relative to the source's folder."""

    @property
    def compression(self) -> str | None:
        """How it is compressed, by its suffix."""
        return next((c for suffix, c in COMPRESSED.items() if self.name.endswith(suffix)), None)

    @property
    def format(self) -> Format:
        """Told by the suffix."""
        stem = self.name
        for suffix in COMPRESSED:
            stem = stem.removesuffix(suffix)
        if stem.endswith(".parquet"):
            return "parquet"
        return "json" if stem.endswith((".json", ".jsonl", ".ndjson")) else "delimited"

    def open(self) -> IO[bytes]:
        """Its uncompressed bytes."""
        stream: IO[bytes] = fsspec.core.OpenFile(
            self.system, self.path, compression=self.compression
        ).open()
        return stream

    def sha256(self) -> str:
        """Hash of the file as it lies there."""
        with self.system.open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Chunk:
    """A part of a file that one task reads: bytes, or row groups of a Parquet file."""

    file: File
    start: int = 0
    stop: int | None = None


def find_files(location: str, pattern: str) -> list[File]:
    """The files of a folder or URI that match a pattern, or the one file that it names."""
    system, root = fsspec.core.url_to_fs(location)
    if system.isfile(root):
        return [File(system, root, root.rsplit("/", 1)[-1])]
    if not system.exists(root):
        return []
    depth = None if pattern == "**" else 1
    names = {path.removeprefix(root).lstrip("/"): path for path in system.find(root, depth)}
    return [File(system, names[name], name) for name in sorted(names) if fnmatch(name, pattern)]
