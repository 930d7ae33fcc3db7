"""JSON: an object a line, or one array of objects; the UCSD dumps write Python literals instead."""

import ast
import codecs
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from rsllm.data import files
from rsllm.data.files import SHOWN, Chunk, Fault, Piece, RawFile, TableFormat, blocks, head
from rsllm.errors import DataError

ROWS_PER_PIECE = 1 << 14
SUFFIXES = {".json", ".jsonl", ".ndjson"}
NAMED = 1000
"""Objects at the beginning of a file whose names are its columns."""


def is_array(file: RawFile) -> bool:
    """Tell whether a JSON file is one array, not an object a line."""
    if file.suffix not in SUFFIXES:
        return False
    with file.open() as stream:
        return bool(stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["))


def names_in(file: RawFile, encoding: str) -> tuple[str, ...]:
    """Return the names that the first thousand objects of a file have."""
    if is_array(file):
        rows = list(islice(_elements(file, encoding), NAMED))
    else:
        rows = [_parse(line.encode(errors="replace")) for line in head(file, encoding, NAMED)]
    return tuple(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def read_objects(chunk: Chunk, table: TableFormat) -> Iterator[Piece]:
    """Yield the pieces of a chunk, in order."""
    if is_array(chunk.file):
        elements = enumerate(_elements(chunk.file, table.encoding))
        while some := list(islice(elements, ROWS_PER_PIECE)):
            yield _piece(some, len(some), table)
        return
    first = 0
    for block in blocks(chunk, table.encoding):
        lines = list(enumerate(block.removesuffix(b"\n").split(b"\n"), start=first))
        rows = ((number, _parse(line)) for number, line in lines if line.strip())
        yield _piece(rows, len(lines), table)
        first += len(lines)


def _parse(line: bytes) -> Any:
    """Return the value that a line holds, or else the fault of it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        shown = line.decode(errors="backslashreplace")[:SHOWN]
        return f"undecodable text at byte {error.start} of the line", shown
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, dict) else ("no JSON object", text[:SHOWN])
    return "no JSON object", text[:SHOWN]


def _piece(rows: Iterable[tuple[int, Any]], num_lines: int, table: TableFormat) -> Piece:
    """Return the rows that are objects as columns of bytes, and the faults of the others."""
    whole: dict[int, list[bytes]] = {}
    broken: dict[int, Fault] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            broken[number] = row if isinstance(row, tuple) else ("no JSON object", _shown(row))
            continue
        try:
            whole[number] = [text_of(row.get(name)).encode() for name in table.columns.values()]
        except UnicodeEncodeError:
            broken[number] = ("undecodable text: half of a surrogate pair", _shown(row))
    return Piece.of(whole, table, broken, num_lines)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, skipkeys=True)[:SHOWN]


def text_of(value: Any) -> str:
    """A value as a field of text holds it: lists separated by commas, nothing for null and NaN."""
    if isinstance(value, list):
        return ", ".join(text_of(part) for part in value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _elements(file: RawFile, encoding: str) -> Iterator[Any]:
    """Yield the elements of a JSON array, one by one.

    Raises:
        DataError: it is not whole.
    """
    decoder, between = json.JSONDecoder(), re.compile(r"[\ufeff\s]*\[\s*")
    with file.open() as stream, io.TextIOWrapper(stream, encoding, newline="") as text:
        held, place, count, more = "", 0, 0, "yes"
        while more:
            more = text.read(files.PIECE_BYTES)
            held, place = held[place:] + more, 0
            while True:
                gap = between.match(held, place)
                start = gap.end() if gap else place
                try:
                    value, stop = decoder.raw_decode(held, start)
                except (ValueError, RecursionError) as error:
                    if more or held[start : start + 1] == "]":
                        break
                    raise DataError(
                        f"{file.name} is no whole JSON array; after {count:,} elements: {error}"
                    ) from error
                if more and stop == len(held):
                    break
                place, count, between = stop, count + 1, re.compile(r"[\s,]*")
                yield value
