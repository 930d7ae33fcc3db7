"""Delimited text. Arrow reads blocks in which every line is a record; where one is not, Python's
csv module reads the block, and tells what is wrong with a record and where the next one begins.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from rsllm.data.files import SHOWN, Chunk, Fault, Piece, RawFile, TableFormat, blocks

RECORD_BYTES = 1 << 20
"""Longest record of several lines; a quote that does not close costs its line and no more."""
csv.field_size_limit(RECORD_BYTES)  # for all of the process; by default a field ends at 128 KiB
UNIT_SEPARATOR = "\x1f"
COUNT, QUOTES = "wrong column count", "broken quotes"
ONE_LINE = ("user", "item", "time", "rating", "split")
"""Roles whose values hold no line break."""


def spans_lines(file: RawFile, table: TableFormat) -> bool:
    """Tell whether some line holds half of a pair of quotes, so that only a reader from the file's
    beginning knows where its records begin."""
    with file.open() as stream, io.TextIOWrapper(stream, "latin-1", newline="\n") as text:
        return any(_has_odd_quotes(line, table) for line in text)


def fields(text: str, table: TableFormat) -> list[str] | None:
    """Return the fields of a record; none where its quotes or line ends are broken."""
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
    """Yield the pieces of a chunk, in order; `names` are the columns of its file."""
    header = chunk.start == 0 and not table.header
    first, skipped, tail = 0, 0, b""
    for block in blocks(chunk, table.encoding):
        if header:  # the first line that says something, and the blank ones before it
            lines = re.match(rb"(?:[ \r]*\n)*[^\n]*\n?", block)
            assert lines, "any text begins with a line"
            block, skipped = block[lines.end() :], lines.group().count(b"\n")
            first, header = skipped, False
        block = tail + block
        parsed, tail = _by_line(block, names, table, first), b""
        if not parsed:
            parsed, tail = _by_record(block, names, table, first)
        yield replace(parsed, num_lines=parsed.num_lines + skipped)
        first, skipped = first + parsed.num_lines, 0
    if tail:
        yield _by_record(tail, names, table, first, last=True)[0]


def _by_line(block: bytes, names: Sequence[str], table: TableFormat, first: int) -> Piece | None:
    """Lines that are a record each, as Arrow reads them; None where there is anything to decide."""
    quote, escape, separator = table.quote.encode(), table.escape.encode(), table.separator.encode()
    blank = block.startswith((b"\n", b"\r\n")) or b"\n\n" in block or b"\n\r\n" in block
    if blank or block.count(b"\r") != block.count(b"\r\n") or (escape and escape in block):
        return None
    quoted = bool(quote) and quote in block
    if quoted:
        # Every quote has to begin or end a whole field of one line.
        mark, ends = re.escape(quote), re.escape(separator) + rb"\n"
        field = rb"%b(?<![^%b]%b)[^%b\n]*%b(?![^%b\r])" % (mark, ends, *3 * [mark], ends)
        if len(separator) > 1 or 2 * len(re.findall(field, block)) != block.count(quote):
            return None
    if len(separator) > 1:
        block = block.replace(separator, UNIT_SEPARATOR.encode())
    reading = pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1)
    parsing = pa_csv.ParseOptions(
        delimiter=table.separator if len(separator) == 1 else UNIT_SEPARATOR,
        quote_char=table.quote if quoted else False,
        double_quote=False,
        ignore_empty_lines=False,
    )
    converting = pa_csv.ConvertOptions(
        check_utf8=False,
        column_types=dict.fromkeys(names, pa.binary()),
        include_columns=list(table.columns.values()),
    )
    try:
        rows = pa_csv.read_csv(io.BytesIO(block), reading, parsing, converting)
    except pa.ArrowInvalid:  # a line has more fields or fewer, or there is none
        return None
    lines = range(first, first + len(rows))
    return Piece(rows.rename_columns(list(table.columns)), lines, {}, len(rows))


def _by_record(
    block: bytes, names: Sequence[str], table: TableFormat, first: int, *, last: bool = False
) -> tuple[Piece, bytes]:
    """Records whose quotes may be anywhere, and the beginning of one that goes on."""
    lines = block.decode(errors="surrogateescape").split("\n")
    if not lines[-1]:
        lines.pop()
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
            torn = not record and table.quote and table.quote in lines[start]
            shown = lines[start].rstrip("\r").encode(errors="replace").decode()[:SHOWN]
            broken[first + start] = (QUOTES if torn else COUNT, shown)
    left = "\n".join(lines[end:]).encode(errors="surrogateescape")
    if left and block.endswith(b"\n"):
        left += b"\n"
    return Piece.of(whole, table, broken, end), left


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
    """Return the line after the next one with an odd number of quotes, if it is near enough."""
    size = len(lines[start])
    for place in range(start + 1, len(lines)):
        size += 1 + len(lines[place])
        if size > RECORD_BYTES:
            return None
        if _has_odd_quotes(lines[place], table):
            return place + 1
    return None
