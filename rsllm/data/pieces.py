"""Bytes of raw files in bounded pieces that end where a line does, and what is read from one."""

import codecs
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from rsllm.data.files import Chunk, TableFormat
from rsllm.errors import DataError

PIECE_BYTES = 8 << 20
SHOWN = 80
"""How many characters of a broken line are kept."""
Fault = tuple[str, str]
"""The reason why a line cannot be used, and the value at fault."""


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


def seekable(encoding: str) -> bool:
    """Whether a newline is one byte that stands for nothing else, wherever reading begins."""
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


def binary_table(rows: Sequence[Sequence[bytes]], table: TableFormat) -> pa.Table:
    """Rows of fields as one column of bytes for each role of the table."""
    columns = {role: [row[i] for row in rows] for i, role in enumerate(table.columns)}
    return pa.table(columns, pa.schema(dict.fromkeys(columns, pa.binary())))
