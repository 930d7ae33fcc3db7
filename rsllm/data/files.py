"""Raw files wherever fsspec reaches: a local folder, a bucket, the inside of an archive."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, cast

import fsspec
from fsspec.utils import infer_compression

from rsllm.config import TimeUnit
from rsllm.errors import ConfigError, DataError


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
        remedy: the way out when a column is missing.
    """

    files: str
    columns: Mapping[str, str]
    separator: str = ""
    header: Sequence[str] = ()
    quoting: bool = False
    encoding: str = "utf-8"
    time_unit: TimeUnit = "seconds"
    max_rating: float = math.inf
    remedy: str = "Name the columns with data.table, such as data.table.user=USER"


@dataclass(frozen=True)
class File:
    """A raw file on some file system."""

    system: Any
    path: str
    name: str
    """Relative to the source's folder."""

    @property
    def compression(self) -> str | None:
        """How it is compressed, by its last suffix."""
        return cast(str | None, infer_compression(self.name))

    @property
    def suffix(self) -> str:
        """Tells the format; the compression's own aside."""
        path = PurePosixPath(self.name)
        return path.with_suffix("").suffix if self.compression else path.suffix

    def open(self, compression: str | None = "infer") -> Any:
        """A stream of its uncompressed bytes.

        Raises:
            DataError: it cannot be opened, such as a link or a device in an archive.
        """
        file = fsspec.core.OpenFile(self.system, self.path, compression=compression)
        try:
            return file.open()
        except Exception as error:  # the file systems' errors share no base class of their own
            raise DataError(f"{self.name} cannot be opened: {error}") from error

    def sha256(self) -> str:
        """Hash of the file as it lies there."""
        with self.open(None) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Chunk:
    """A part of a file that one task reads: bytes, or row groups of a Parquet file."""

    file: File
    start: int = 0
    stop: int | None = None


def find_files(location: str, pattern: str) -> list[File]:
    """The files of a folder or URI, or the one file that it names, if they match a pattern.

    Raises:
        ConfigError: a URI of a kind that is unknown or needs another package, a damaged archive.
    """
    try:
        system, root = fsspec.core.url_to_fs(location)
    except Exception as error:  # the file systems' errors share no base class of their own
        raise ConfigError(f"{location} cannot be read: {error}") from error
    if system.isfile(root):
        names = {root.rsplit("/", 1)[-1]: root}
    else:
        paths = system.find(root, None if pattern == "**" else 1) if system.exists(root) else []
        names = {path.removeprefix(root).lstrip("/"): path for path in paths}
    return [File(system, names[name], name) for name in sorted(names) if fnmatch(name, pattern)]
