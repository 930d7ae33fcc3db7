"""Raw files wherever fsspec reaches, in a folder, a bucket or an archive, and the pieces of them
that are read at once."""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, cast

import fsspec
import pyarrow as pa
from fsspec.utils import infer_compression

from rsllm.config import AUTO
from rsllm.errors import ConfigError, DataError

PIECE_BYTES = 8 << 20
SHOWN = 80
"""How many characters of a broken line are kept."""
Fault = tuple[str, str]
"""The reason why a line cannot be used, and the value at fault."""


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
        """Return a stream of its uncompressed bytes.

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


@dataclass(frozen=True)
class Piece:
    """Some lines of a chunk, parsed.

    Attributes:
        columns: one string (or bytes) column per role; a row for each whole record.
        lines: number of each row's first line (row, in Parquet and JSON arrays), from 0 at the
            start of the chunk.
        broken: lines that are no rows.
        num_lines: all lines of the piece, the header and blank ones too.
    """

    columns: pa.Table
    lines: Sequence[int]
    broken: dict[int, Fault] = field(default_factory=dict)
    num_lines: int = 0

    @classmethod
    def of(
        cls,
        rows: Mapping[int, Sequence[bytes]],
        table: TableFormat,
        broken: dict[int, Fault],
        num_lines: int,
    ) -> Piece:
        """Make a piece of rows of fields, one for each role of the table, by their line."""
        columns = {role: [row[i] for row in rows.values()] for i, role in enumerate(table.columns)}
        types = pa.schema(dict.fromkeys(columns, pa.binary()))
        return cls(pa.table(columns, types), [*rows], broken, num_lines)


@dataclass(frozen=True)
class Reject:
    """A raw line that cannot be used."""

    file: str
    line: int
    """Line in the file (row, in Parquet), counted from 1, headers included."""
    reason: str
    value: str = ""
    """The value at fault."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.value!r} in {self.file}:{self.line}"


def find_files(location: str, pattern: str) -> list[RawFile]:
    """Return the files of a folder or URI, or the one file that it names, if they match a pattern.

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


def head(file: RawFile, encoding: str, count: int = 1) -> list[str]:
    """Return the first lines of a text that say something, without their ends."""
    with file.open() as stream, io.TextIOWrapper(stream, encoding, "replace", "\n") as text:
        lines = (line.removeprefix("\ufeff").rstrip("\r\n") for line in text)
        return list(islice((line for line in lines if line.strip()), count))


def seekable(encoding: str) -> bool:
    """Tell whether a newline is one byte that stands for nothing else, wherever reading begins."""
    name = codecs.lookup(encoding).name
    return not name.startswith(("utf-16", "utf-32", "utf-7", "iso2022", "hz"))


def blocks(chunk: Chunk, encoding: str) -> Iterator[bytes]:
    """Yield UTF-8 that ends at a line's end; a line belongs to the chunk with its first byte.

    Bytes that are no text of the encoding stay what they are.

    Raises:
        DataError: there are such bytes in text of two bytes a character, whose lines nobody knows.
    """
    name = codecs.lookup(encoding).name
    with chunk.file.open() as stream:
        if not seekable(name):
            text = io.TextIOWrapper(stream, name, newline="\n")
            try:
                while characters := text.read(PIECE_BYTES):
                    yield (characters + text.readline()).removeprefix("\ufeff").encode()
            except UnicodeError as error:
                raise DataError(
                    f"{chunk.file.name} is no {name} text ({error}); set its encoding"
                ) from error
            return
        if chunk.start:  # the line that begins before it belongs to the chunk before it
            stream.seek(chunk.start - 1)
            stream.readline()
        while chunk.stop is None or stream.tell() < chunk.stop:
            left = PIECE_BYTES if chunk.stop is None else chunk.stop - stream.tell()
            piece = stream.read(min(PIECE_BYTES, left))
            if not piece:
                return
            if not piece.endswith(b"\n"):
                piece += stream.readline()
            if name not in ("utf-8", "utf-8-sig", "ascii"):
                piece = piece.decode(name, "surrogateescape").encode("utf-8", "surrogateescape")
            yield piece.removeprefix(codecs.BOM_UTF8)
