"""JSON: an object a line, or one array of objects; the UCSD dumps write Python literals instead."""

import ast
import codecs
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from rsllm.data import pieces
from rsllm.data.files import Chunk, File, Table
from rsllm.data.pieces import SHOWN, Fault, Piece, binary_table, blocks
from rsllm.errors import DataError

ROWS_PER_PIECE = 1 << 14
SUFFIXES = {".json", ".jsonl", ".ndjson"}
_BETWEEN = re.compile(r"[\s,]*")
HEAD = 1000
"""Objects whose names are the columns."""


def is_array(file: File) -> bool:
    """Whether a JSON file is one array, not an object a line."""
    if file.suffix not in SUFFIXES:
        return False
    with file.open() as stream:
        return bool(stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["))


def names_in(file: File, encoding: str) -> tuple[str, ...]:
    """The names that the first thousand objects of a file have."""
    rows: Iterator[Any]
    if is_array(file):
        rows = islice(_elements(file, encoding), HEAD)
    else:
        with file.open() as stream, io.TextIOWrapper(stream, encoding, "replace", "\n") as text:
            lines = (line.removeprefix("\ufeff") for line in text if line.strip())
            rows = iter([_object(line) for line in islice(lines, HEAD)])
    found = (row for row in rows if isinstance(row, dict))
    return tuple(dict.fromkeys(name for row in found for name in row))


def read_objects(chunk: Chunk, table: Table) -> Iterator[Piece]:
    """The pieces of a chunk, in order."""
    if is_array(chunk.file):
        yield from _read_array(chunk.file, table)
        return
    first = 0
    for piece in blocks(chunk, table.encoding):
        yield (parsed := _json(piece, table, first))
        first += parsed.num_lines


def _json(piece: bytes, table: Table, first: int) -> Piece:
    """One object a line; the UCSD dumps write them as Python literals."""
    whole: list[list[bytes]] = []
    numbers: list[int] = []
    broken: dict[int, Fault] = {}
    texts = piece.removesuffix(b"\n").split(b"\n")
    for line, text in enumerate(texts, start=first):
        if not text.strip():
            continue
        try:
            row = _object(text.decode())
            if row is None:
                broken[line] = ("no JSON object", text.decode()[:SHOWN])
            else:
                whole.append(_values(row, table))
                numbers.append(line)
        except UnicodeDecodeError as error:
            shown = text.decode(errors="backslashreplace")[:SHOWN]
            broken[line] = (f"undecodable text at byte {error.start} of the line", shown)
        except UnicodeEncodeError:
            shown = text.decode(errors="backslashreplace")[:SHOWN]
            broken[line] = ("undecodable text: half of a surrogate pair", shown)
    return Piece(binary_table(whole, table), numbers, broken, len(texts))


def _object(text: str) -> dict[str, Any] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def _values(row: Mapping[str, Any], table: Table) -> list[bytes]:
    return [text_of(row.get(name)).encode() for name in table.columns.values()]


def text_of(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(text_of(part) for part in value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _read_array(file: File, table: Table) -> Iterator[Piece]:
    first, elements = 0, _elements(file, table.encoding)
    while some := list(islice(elements, ROWS_PER_PIECE)):
        whole: list[list[bytes]] = []
        numbers: list[int] = []
        broken: dict[int, Fault] = {}
        for number, row in enumerate(some, start=first):
            if isinstance(row, dict):
                whole.append(_values(row, table))
                numbers.append(number)
            else:
                broken[number] = ("no JSON object", json.dumps(row)[:SHOWN])
        yield Piece(binary_table(whole, table), numbers, broken, len(some))
        first += len(some)


def _elements(file: File, encoding: str) -> Iterator[Any]:
    """What a JSON array holds, one by one.

    Raises:
        DataError: it is not whole.
    """
    decoder, between = json.JSONDecoder(), re.compile(r"[\ufeff\s]*\[\s*")
    with file.open() as stream, io.TextIOWrapper(stream, encoding, newline="") as text:
        held, place, count, more = "", 0, 0, "yes"
        while more:
            more = text.read(pieces.PIECE_BYTES)
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
                place, count, between = stop, count + 1, _BETWEEN
                yield value
