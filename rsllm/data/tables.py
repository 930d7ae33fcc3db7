"""Raw files as columns of strings: delimited text, JSON lines and Parquet, in bounded pieces.

A large file is cut into chunks that are read independently of each other; a chunk is read in
pieces, and no line of it is lost: it is in a piece or in the piece's list of broken lines.
"""

import ast
import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from rsllm.config import TimeUnit
from rsllm.data.files import Chunk, File, Table
from rsllm.errors import DataError

CHUNK_BYTES = 32 << 20
PIECE_BYTES = 8 << 20
ROWS_PER_PIECE = 1 << 18
ONE_BYTE_ENCODINGS = {"utf-8", "latin-1", "ascii"}
"""Encodings in which a newline is one byte that stands for nothing else."""
UNIT_SEPARATOR = "\x1f"
JSON = {".json", ".jsonl", ".ndjson"}


@dataclass(frozen=True)
class Piece:
    """Some lines of a chunk, parsed.

    Attributes:
        columns: one string (or bytes) column per role; a row for each whole line.
        lines: number of each row's line, from 0 at the start of the chunk.
        broken: lines that are no rows, and why.
        num_lines: all lines of the piece, the header too.
    """

    columns: pa.Table
    lines: list[int] | range
    broken: dict[int, str] = field(default_factory=dict)
    num_lines: int = 0


def plan(files: Sequence[File], table: Table) -> list[Chunk]:
    """Chunks of all files, in their order. Only the columns of its roles need be the same in all.

    Raises:
        DataError: a file lacks a column, or has other columns than the first one.
    """
    schemas = [_schema(file, table).items() for file in files]
    for file, found in zip(files, schemas, strict=True):
        if other := sorted(found ^ schemas[0]):
            raise DataError(
                f"{file.name} differs from {files[0].name} in column {other[0][0]!r}; give all"
                " files of a table the same columns"
            )
    return [chunk for file in files for chunk in _chunks(file, table)]


def _chunks(file: File, table: Table) -> list[Chunk]:
    if file.suffix == ".parquet":
        groups = _parquet(file).num_row_groups
        return [Chunk(file, group, group + 1) for group in range(groups)]
    if file.compression or table.encoding not in ONE_BYTE_ENCODINGS or _spans_lines(table):
        return [Chunk(file)]
    size = int(file.system.size(file.path))
    return [
        Chunk(file, start, min(start + CHUNK_BYTES, size)) for start in range(0, size, CHUNK_BYTES)
    ]


def _spans_lines(table: Table) -> bool:
    """Texts of items may hold line breaks within quotes, so their files are read as a whole."""
    return table.quoting and "user" not in table.columns


def _parquet(file: File) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.open(), page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.name} is no whole Parquet file: {error}") from error


def _schema(file: File, table: Table) -> dict[str, str]:
    """The types of the wanted columns; others may differ from file to file."""
    found = dict.fromkeys(columns_of(file, table), "text")
    if file.suffix == ".parquet":
        found = {field.name: str(field.type) for field in _parquet(file).schema_arrow}
    missing = [column for column in table.columns.values() if column not in found]
    if missing and (found or file.suffix not in JSON):
        held = f"it has {', '.join(found)}" if found else "it is empty"
        raise DataError(f"{file.name} has no column {missing[0]!r}; {held}. {table.remedy}")
    return {column: found.get(column, "text") for column in table.columns.values()}


def columns_of(file: File, table: Table) -> tuple[str, ...]:
    """The columns of a file, in order; those of JSON lines as the first thousand have them.

    Raises:
        DataError: its first line is no text of the declared encoding, or no line.
    """
    if table.header:
        return tuple(table.header)
    if file.suffix == ".parquet":
        return tuple(_parquet(file).schema_arrow.names)
    with file.open() as stream:
        marked = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if marked and "16" not in table.encoding:
        raise DataError(f"{file.name} is UTF-16 text; set data.table.encoding=utf-16")
    encoding = "utf-8-sig" if table.encoding == "utf-8" else table.encoding
    with file.open() as stream, io.TextIOWrapper(stream, encoding, "replace", "\n") as text:
        if file.suffix in JSON:
            rows = map(_object, islice(text, 1000))
            return tuple(dict.fromkeys(name for row in rows for name in row or ()))
        line = text.readline().rstrip("\r\n")
    if "\r" in line:
        raise DataError(f"{file.name} has carriage returns for line ends; convert them to newlines")
    if table.quoting:
        return tuple(next(csv.reader([line], delimiter=table.separator), []))
    return tuple(line.split(table.separator))


def read_all(files: Sequence[File], table: Table) -> Iterator[tuple[File, int, Piece]]:
    """All pieces of some files, each with the line of its file, from 1, that it counts from."""
    for file in files:
        first = 1
        for chunk in plan([file], table):
            num_lines = 0
            for piece in read(chunk, table):
                yield file, first, piece
                num_lines += piece.num_lines
            first += num_lines


def read(chunk: Chunk, table: Table) -> Iterator[Piece]:
    """The pieces of a chunk, in order."""
    if chunk.file.suffix == ".parquet":
        yield from _read_parquet(chunk, table)
        return
    names = () if chunk.file.suffix in JSON else columns_of(chunk.file, table)
    first, header = 0, int(chunk.start == 0 and bool(names) and not table.header)
    for piece in _pieces(chunk, table):
        if names:
            parsed = _delimited(piece, names, table, first, header)
        else:
            parsed = _json(piece, table, first)
        yield parsed
        first, header = first + parsed.num_lines, 0


def _pieces(chunk: Chunk, table: Table) -> Iterator[bytes]:
    """Bytes that end at a line's end; a line belongs to the chunk that holds its first byte."""
    whole = _spans_lines(table) or table.encoding not in ONE_BYTE_ENCODINGS
    with chunk.file.open() as stream:
        if chunk.start:
            stream.seek(chunk.start - 1)
            stream.readline()
        while chunk.stop is None or stream.tell() < chunk.stop:
            left = PIECE_BYTES if chunk.stop is None else chunk.stop - stream.tell()
            piece = stream.read() if whole else stream.read(min(PIECE_BYTES, left))
            if not piece:
                return
            if not piece.endswith(b"\n"):
                piece += stream.readline()
            if table.encoding != "utf-8":
                piece = _utf_8(piece, table.encoding, chunk.file)
            yield piece.removeprefix(codecs.BOM_UTF8)


def _utf_8(piece: bytes, encoding: str, file: File) -> bytes:
    try:
        return piece.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name} is no {encoding} text at byte {error.start}; set its encoding"
        ) from error


def _delimited(
    piece: bytes, names: tuple[str, ...], table: Table, first: int, header: int
) -> Piece:
    if table.quoting and b'"' in piece:
        return _quoted(piece, names, table, first, header)
    separator = table.separator
    if len(separator) > 1:
        piece = piece.replace(separator.encode(), UNIT_SEPARATOR.encode())
        separator = UNIT_SEPARATOR
    if b"\r" in piece:  # Arrow would end a line there: make it one of too many fields
        piece = re.sub(rb"\r(?!\n)", separator.encode() * len(names), piece)
    broken: dict[int, str] = {}

    def refuse(row: Any) -> str:
        broken[first + row.number - 1] = "wrong column count"
        return "skip"

    reading = pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(piece) + 1)
    reading.skip_rows_after_names = header
    parsing = pa_csv.ParseOptions(
        delimiter=separator, quote_char=False, ignore_empty_lines=False, invalid_row_handler=refuse
    )
    converting = pa_csv.ConvertOptions(
        check_utf8=False,
        column_types=dict.fromkeys(names, pa.binary()),
        include_columns=list(table.columns.values()),
    )
    rows = pa_csv.read_csv(io.BytesIO(piece), reading, parsing, converting)
    num_lines = header + len(rows) + len(broken)
    every = range(first + header, first + num_lines)
    lines = [line for line in every if line not in broken] if broken else every
    return Piece(rows.rename_columns(list(table.columns)), lines, broken, num_lines)


def _quoted(piece: bytes, names: tuple[str, ...], table: Table, first: int, header: int) -> Piece:
    """The same with fields in double quotes; a line of its own each, but for texts of items."""
    text, whole, broken = piece.decode(errors="surrogateescape"), {}, {}
    places = [names.index(column) for column in table.columns.values()]
    for line, fields in _records(text, table.separator, _spans_lines(table)):
        if line >= header and len(fields) == len(names):
            whole[first + line] = [fields[i].encode(errors="surrogateescape") for i in places]
        elif line >= header:
            broken[first + line] = "wrong column count"
    num_lines = text.count("\n") + (not text.endswith("\n"))
    return Piece(_table(whole, table), list(whole), broken, num_lines)


def _table(rows: Mapping[int, list[bytes]], table: Table) -> pa.Table:
    columns = {role: [row[i] for row in rows.values()] for i, role in enumerate(table.columns)}
    return pa.table(columns, pa.schema(dict.fromkeys(columns, pa.binary())))


def _records(text: str, separator: str, spans_lines: bool) -> Iterator[tuple[int, list[str]]]:
    """Each record's line, from 0, and its fields; none where its quotes do not close."""
    if not spans_lines:
        for line, record in enumerate(text.removesuffix("\n").split("\n")):
            reader = csv.reader([record.rstrip("\r")], delimiter=separator, strict=True)
            try:
                yield line, next(reader, [])
            except csv.Error:
                yield line, []
        return
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 0
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num
    except csv.Error as error:
        raise DataError(f"the record in line {line + 1} of the items: {error}") from error


def _json(piece: bytes, table: Table, first: int) -> Piece:
    """One object per line; the UCSD dumps write them as Python literals."""
    whole, broken = {}, {}
    texts = piece.removesuffix(b"\n").split(b"\n")
    for line, text in enumerate(texts, start=first):
        try:
            row = _object(text.decode())
            if row is None:
                broken[line] = "no JSON object"
            else:
                whole[line] = [_text(row.get(name)).encode() for name in table.columns.values()]
        except UnicodeDecodeError as error:
            broken[line] = f"undecodable text at byte {error.start} of the line"
        except UnicodeEncodeError:
            broken[line] = "undecodable text: half of a surrogate pair"
    return Piece(_table(whole, table), list(whole), broken, len(texts))


def _object(text: str) -> dict[str, Any] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(part) for part in value)
    return "" if value is None else str(value)


def _read_parquet(chunk: Chunk, table: Table) -> Iterator[Piece]:
    first = 0
    wanted = list(table.columns.values())
    try:
        batches = _parquet(chunk.file).iter_batches(
            ROWS_PER_PIECE, row_groups=list(range(chunk.start, chunk.stop or 0)), columns=wanted
        )
        for batch in batches:
            columns = [_plain(batch.column(name), table.time_unit) for name in wanted]
            lines = range(first, first + len(batch))
            yield Piece(pa.table(columns, names=list(table.columns)), lines, {}, len(batch))
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{chunk.file.name} is damaged: {error}") from error


def _plain(column: pa.Array, unit: TimeUnit) -> pa.Array:
    """A typed column as the text that a file would hold; times in the unit, null as empty."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"), safe=False)
        column = column if unit == "iso8601" else column.cast(pa.int64())
        column = pc.divide(column.cast(pa.float64()), 1e3) if unit == "seconds" else column
    if pa.types.is_nested(column.type):
        return pa.array([_text(value) for value in column.to_pylist()], pa.string())
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column.cast(pa.binary()).fill_null(b"")
    return column.cast(pa.string()).fill_null("")
