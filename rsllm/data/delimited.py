"""Delimited text. Where each line is a record Arrow reads it; where quotes may say otherwise,
Python's csv module does, which tells what is wrong with a record and where the next one begins.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from rsllm.data.files import Chunk, RawFile, TableFormat
from rsllm.data.pieces import SHOWN, Fault, Piece, binary_table, blocks

RECORD_BYTES = 1 << 20
"""Longest record of several lines; a quote that does not close costs its line and no more."""
csv.field_size_limit(RECORD_BYTES)  # for all of the process; by default a field ends at 128 KiB
UNIT_SEPARATOR = "\x1f"
COUNT, QUOTES = "wrong column count", "broken quotes"
ONE_LINE = ("user", "item", "time", "rating", "split")
"""Roles whose values hold no line break."""


def spans_lines(file: RawFile, table: TableFormat) -> bool:
    """Whether some line holds half of a pair of quotes, so that only a reader from the file's
    beginning knows where its records begin."""
    quote = table.quote.encode()
    with file.open() as stream:
        while block := stream.read(1 << 20):
            if quote not in block:
                continue
            block += stream.readline()
            if table.escape:
                block = re.sub(re.escape(table.escape.encode()) + rb".", b"", block)
            held = np.frombuffer(block, np.uint8)
            ends, quotes = np.flatnonzero(held == 10), np.flatnonzero(held == quote[0])
            if (np.searchsorted(quotes, ends) % 2).any() or len(quotes) % 2:
                return True
    return False


def fields(text: str, table: TableFormat) -> list[str] | None:
    """The fields of a record; none where its quotes or line ends are broken."""
    quote, escape, text = table.quote, table.escape, text.rstrip("\r")
    if not (quote and quote in text) and not (escape and escape in text):
        return None if "\r" in text else text.split(table.separator)
    # The csv module knows separators of one character only.
    separator = table.separator if len(table.separator) == 1 else UNIT_SEPARATOR
    how: dict[str, Any] = {"delimiter": separator, "escapechar": escape or None, "strict": True}
    how |= {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    try:
        return next(csv.reader([text.replace(table.separator, separator)], **how), [])
    except csv.Error:
        return None


def read_delimited(chunk: Chunk, table: TableFormat, names: Sequence[str]) -> Iterator[Piece]:
    """The pieces of a chunk, in order; `names` are the columns of its file."""
    header = chunk.start == 0 and not table.header
    marks = [mark.encode() for mark in (table.quote, table.escape) if mark]
    first, skipped, tail = 0, 0, b""
    for piece in blocks(chunk, table.encoding):
        if header:  # the first line that says something, and the blank ones before it
            lines = re.match(rb"(?:[ \r]*\n)*[^\n]*\n?", piece)
            assert lines, "any text begins with a line"
            piece, skipped = piece[lines.end() :], lines.group().count(b"\n")
            first, header = skipped, False
        piece, tail = tail + piece, b""
        quoted = any(mark in piece for mark in marks)
        if quoted and not _is_plain(piece, table):
            parsed, tail = _by_record(piece, names, table, first)
        else:
            parsed = _by_line(piece, names, table, first, quoted=quoted)
        yield replace(parsed, num_lines=parsed.num_lines + skipped)
        first, skipped = first + parsed.num_lines, 0
    if tail:
        yield _by_record(tail, names, table, first, last=True)[0]


def _is_plain(piece: bytes, table: TableFormat) -> bool:
    """Whether each quote begins or ends a whole field of one line, so that nothing is to decide."""
    separator, quote = table.separator.encode(), table.quote.encode()
    escape = table.escape.encode()
    if len(separator) > 1 or len(quote) != 1 or (escape and escape in piece):
        return False
    held = np.frombuffer(b"\n" + piece + b"\n", np.uint8)
    quotes, ends = np.flatnonzero(held == quote[0]), np.flatnonzero(held == 10)
    if len(quotes) % 2 or piece.count(b"\r") != piece.count(b"\r\n"):
        return False
    begin, end = quotes[::2], quotes[1::2]
    fields_begin = np.isin(held[begin - 1], [*separator, 10]).all()
    fields_end = np.isin(held[end + 1], [*separator, 10, 13]).all()
    one_line = np.array_equal(np.searchsorted(ends, begin), np.searchsorted(ends, end))
    return bool(fields_begin and fields_end and one_line)


def _by_line(
    piece: bytes, names: Sequence[str], table: TableFormat, first: int, *, quoted: bool
) -> Piece:
    """Lines of a record each, with whole quoted fields at most."""
    separator = table.separator
    num_lines = piece.count(b"\n") + bool(piece and not piece.endswith(b"\n"))
    numbers: Sequence[int] = range(num_lines)
    if piece.startswith((b"\n", b"\r\n")) or b"\n\n" in piece or b"\n\r\n" in piece:
        lines = piece.split(b"\n")
        numbers = [number for number in numbers if lines[number].strip(b" \r")]
        piece = b"\n".join([lines[number] for number in numbers])
    if not numbers:
        return Piece(binary_table([], table), [], {}, num_lines)
    if len(separator) > 1:
        piece = piece.replace(separator.encode(), UNIT_SEPARATOR.encode())
        separator = UNIT_SEPARATOR
    if b"\r" in piece:  # Arrow would end a line there: make it one of too many fields
        piece = re.sub(rb"\r(?!\n|$)", separator.encode() * len(names), piece)
    broken: dict[int, Fault] = {}

    def refuse(row: Any) -> str:
        text = row.text.replace(separator * len(names), "\r").replace(separator, table.separator)
        broken[first + numbers[row.number - 1]] = (COUNT, text[:SHOWN])
        return "skip"

    reading = pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(piece) + 1)
    parsing = pa_csv.ParseOptions(
        delimiter=separator,
        quote_char=table.quote if quoted else False,
        double_quote=False,
        ignore_empty_lines=False,
        invalid_row_handler=refuse,
    )
    converting = pa_csv.ConvertOptions(
        check_utf8=False,
        column_types=dict.fromkeys(names, pa.binary()),
        include_columns=list(table.columns.values()),
    )
    rows = pa_csv.read_csv(io.BytesIO(piece), reading, parsing, converting)
    places: Sequence[int] = range(first, first + num_lines)
    if broken or len(numbers) < num_lines:
        places = [first + number for number in numbers if first + number not in broken]
    broken = {line: fault for line, fault in broken.items() if fault[1].strip(" ")}  # not blank
    return Piece(rows.rename_columns(list(table.columns)), places, broken, num_lines)


def _by_record(
    piece: bytes, names: Sequence[str], table: TableFormat, first: int, *, last: bool = False
) -> tuple[Piece, bytes]:
    """Records whose quotes may be anywhere, and the beginning of one that goes on."""
    lines = piece.decode(errors="surrogateescape").removesuffix("\n").split("\n")
    places = [names.index(column) for column in table.columns.values()]
    single = [names.index(table.columns[role]) for role in ONE_LINE if role in table.columns]
    whole: dict[int, list[bytes]] = {}
    broken: dict[int, Fault] = {}
    end = 0
    for start, stop, record in records(lines, table, len(names), single, last=last):
        end = stop
        if record and len(record) == len(names):
            whole[first + start] = [record[i].encode(errors="surrogateescape") for i in places]
        elif record != []:
            torn = not record and table.quote in lines[start]
            shown = lines[start].encode(errors="replace").decode()[:SHOWN]
            broken[first + start] = (QUOTES if torn else COUNT, shown)
    left = "\n".join(lines[end:]).encode(errors="surrogateescape")
    if left and piece.endswith(b"\n"):
        left += b"\n"
    return Piece(binary_table([*whole.values()], table), [*whole], broken, end), left


def records(
    lines: Sequence[str], table: TableFormat, width: int, single: Sequence[int] = (), *, last: bool
) -> Iterator[tuple[int, int, list[str] | None]]:
    """Each record's first line, the line after it, and its fields: none if its quotes are broken,
    no fields if it is blank.

    A record has several lines if its first one holds an odd number of quotes, and the lines up to
    the next such one make a record of `width` fields, those of `single` in one line. Else it is the
    first line alone. Unless these are the `last` lines, they end before one that may go on.
    """
    start = 0
    while start < len(lines):
        line, stop = lines[start], start + 1
        record = fields(line, table) if line.strip(" \r") else []
        if _has_odd_quotes(line, table):
            closing = _closing(lines, start, table)
            if closing is None and not last and sum(map(len, lines[start:])) < RECORD_BYTES:
                return
            joined = fields("\n".join(lines[start:closing]), table) if closing else None
            if joined and len(joined) == width and not any("\n" in joined[i] for i in single):
                stop, record = closing or stop, joined
        yield start, stop, record
        start = stop


def _has_odd_quotes(line: str, table: TableFormat) -> bool:
    if not table.quote or table.quote not in line:
        return False
    if table.escape and table.escape in line:
        line = re.sub(re.escape(table.escape) + ".", "", line)
    return line.count(table.quote) % 2 == 1


def _closing(lines: Sequence[str], start: int, table: TableFormat) -> int | None:
    """The line after the next one with an odd number of quotes, if it is near enough."""
    size = len(lines[start])
    for place in range(start + 1, len(lines)):
        size += 1 + len(lines[place])
        if size > RECORD_BYTES:
            return None
        if _has_odd_quotes(lines[place], table):
            return place + 1
    return None
