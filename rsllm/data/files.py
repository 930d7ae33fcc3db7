"""Raw files wherever fsspec reaches: a local folder, a bucket, the inside of an archive."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, cast

import fsspec
from fsspec.utils import infer_compression

from rsllm.config import AUTO
from rsllm.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """The format of a raw table's files; `auto` until `rsllm.data.dialect` looked.

    Attributes:
        files: name of its file, or a glob, below the source's folder.
        columns: the column of each role (user, item, time, rating, title, split, text...).
        header: the columns' names where the file does not say them in its first line.
        separator: between fields; empty for JSON and Parquet, which the suffix tells.
        quote: character around fields that may hold anything; empty: there are no such fields.
        escape: character before quotes within those; empty: they are doubled.
        encoding: of the text.
        time_unit: of the time column, or its format.
        max_rating: a rating must lie between 0 and this; 0: any number.
        missing: what is no id, beside nothing.
        fold_ids: whether the id "1.0" is "1".
        strip_years: whether years in parentheses are taken off titles.
        move_articles: whether titles such as "Matrix, The" are turned round.
        unescape: whether titles are HTML.
        remedy: the way out when a column is missing.
    """

    files: str
    columns: Mapping[str, str]
    header: Sequence[str] = ()
    separator: str = AUTO
    quote: str = AUTO
    escape: str = AUTO
    encoding: str = AUTO
    time_unit: str = AUTO
    max_rating: float = 0.0
    missing: Sequence[str] = ()
    fold_ids: bool = False
    strip_years: bool = True
    move_articles: bool = True
    unescape: bool = False
    remedy: str = "Name the columns with data.table, such as --set data.table.user=USER"


@dataclass(frozen=True)
class RawFile:
    """A raw file on some file system."""

    system: Any
    path: str
    name: str
    """Relative to the source's folder."""

    @property
    def compression(self) -> str | None:
        """The compression that its last suffix names, or None."""
        return cast(str | None, infer_compression(self.name))

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, before that of the compression."""
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

    file: RawFile
    start: int = 0
    stop: int | None = None


def find_files(location: str, pattern: str) -> list[RawFile]:
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
    return [RawFile(system, names[name], name) for name in sorted(names) if fnmatch(name, pattern)]
