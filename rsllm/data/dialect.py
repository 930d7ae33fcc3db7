"""Finds by looking what files do not say of themselves: encoding, separator, quotes, time unit.

Each is read under every candidate, and the one that leaves fewest lines broken is taken. All bytes
count, so the answer depends neither on the order of the lines nor on the files they stand in.
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from rsllm.config import AUTO
from rsllm.data import objects
from rsllm.data.delimited import fields, records
from rsllm.data.files import Chunk, RawFile, TableFormat, blocks, head
from rsllm.data.tables import columns_of, parquet, read_all
from rsllm.data.values import as_text, time_units
from rsllm.errors import ConfigError

BLOCK_BYTES, HEAD_BYTES = 1 << 20, 1 << 16
SAMPLE_BYTES = 1 << 18
SAMPLED_TIMES = 1000
"""Values of a piece whose unit is looked for."""
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|", ".tab": "\t,;|"}
"""Separators of fields, the likeliest first, by suffix."""
QUOTES = (('"', ""), ('"', "\\"), ("", ""))
"""Quotes with what escapes them, the likeliest first."""
_NO_UTF8 = re.compile("[\udc80-\udcff]")
"""How Python's "surrogateescape" holds the bytes 0x80 to 0xff that are no UTF-8."""
_ONLY_1252 = re.compile("[\udc80-\udc9f]")
"""Bytes that are letters in windows-1252, and nothing in latin-1."""


def first_look(table: TableFormat, file: RawFile) -> TableFormat:
    """Return the table as the beginning of a file has it: enough to read its columns."""
    if file.suffix == ".parquet":
        return replace(table, separator="", quote="", escape="", encoding="utf-8")
    if table.encoding == AUTO:
        table = replace(table, encoding=_encoding([file], whole=False)[0])
    if file.suffix in objects.SUFFIXES:
        return replace(table, separator="", quote="", escape="")
    quote = '"' if table.quote == AUTO else table.quote
    table = replace(table, quote=quote, escape="" if table.escape == AUTO else table.escape)
    if table.separator != AUTO:
        return table
    line = "".join(head(file, table.encoding))
    candidates = SEPARATORS.get(file.suffix, "\t,;|")
    several = [*candidates, "::"] if "::" in line else [*candidates]
    counts = [len(fields(line, replace(table, separator=mark)) or ()) for mark in several]
    return replace(table, separator=several[counts.index(max(counts))])


def settle(table: TableFormat, files: Sequence[RawFile]) -> tuple[TableFormat, dict[str, str]]:
    """Return the table with nothing left to find, and what was found, by setting.

    What the files do not show, such as an encoding of theirs beyond ASCII, is not found.

    Raises:
        ConfigError: times that may be of several formats, and mean different times.
        DataError: a file that cannot be opened.
    """
    first, found, noted = first_look(table, files[0]), dict[str, str](), dict[str, str]()
    if table.separator == AUTO and first.separator:
        found["separator"] = first.separator
    if table.encoding == AUTO and files[0].suffix != ".parquet":
        encoding, shown = _encoding(files)
        first = replace(first, encoding=encoding)
        noted = {"encoding": f"{encoding}{shown}"} if shown or encoding == "utf-16" else {}
    if first.separator and table.quote and AUTO in (table.quote, table.escape):
        first, marks = _quoting(table, first, files)
        found |= marks
    if "time" in table.columns and table.time_unit == AUTO:
        first = replace(first, time_unit=_time_unit(first, files))
        found["time_unit"] = first.time_unit
    return first, found | noted


def _quoting(
    table: TableFormat, first: TableFormat, files: Sequence[RawFile]
) -> tuple[TableFormat, dict[str, str]]:
    """The table with the quotes that leave fewest of some lines broken, and what was found."""
    sample = _first_quoted(files, first)
    if not sample:
        return replace(first, quote=first.quote if table.quote != AUTO else ""), {}
    quotes = [(q, e) for q, e in QUOTES if table.quote in (AUTO, q) and table.escape in (AUTO, e)]
    width = len(columns_of(files[0], first))

    def broken(marks: tuple[str, str]) -> int:
        marked = replace(first, quote=marks[0], escape=marks[1])
        found = (record for _, _, record in records(sample, marked, width, last=True))
        return sum(record is None or len(record) not in (0, width) for record in found)

    quote, escape = min(quotes or [(first.quote, first.escape)], key=broken)
    found = {"quote": quote} if table.quote == AUTO else {}
    found |= {"escape": escape} if table.escape == AUTO and quote else {}
    return replace(first, quote=quote, escape=escape), found


def _encoding(files: Sequence[RawFile], *, whole: bool = True) -> tuple[str, str]:
    """UTF-8, unless more bytes are none than are; or UTF-16, if the first file says so.

    What is no UTF-8 is windows-1252 where it holds what only that has, or else latin-1. Beside it
    stands how much of a guess it is.
    """
    surplus, others, example, only_1252 = 0, 0, "", False
    for number, file in enumerate(files):
        with file.open() as stream:
            while block := stream.read(BLOCK_BYTES if whole else HEAD_BYTES):
                if not number and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    return "utf-16", ""
                if not block.isascii():
                    block += stream.readline()
                    text = block.decode(errors="surrogateescape")
                    surplus += len(block) - len(text)  # bytes that letters of UTF-8 have beyond one
                    if broken := _NO_UTF8.findall(text):
                        others += len(broken)
                        example = example or next(filter(_NO_UTF8.search, text.split("\n")))
                        only_1252 |= bool(_ONLY_1252.search(text))
                if not whole:
                    break
    if others <= surplus:
        return "utf-8", " (as its letters beyond ASCII are)" if surplus else ""
    encoding = "cp1252" if only_1252 else "latin-1"
    line = example.encode(errors="surrogateescape").decode(encoding, "replace").strip()[:80]
    return encoding, f" (a guess: {others:,} bytes are no UTF-8, such as in {line!r})"


def _first_quoted(files: Sequence[RawFile], table: TableFormat) -> list[str]:
    """Some lines from the first one on that holds a quote."""
    for file in files:
        for block in blocks(Chunk(file), table.encoding):
            if b'"' in block:
                start = block.rfind(b"\n", 0, block.index(b'"')) + 1
                stop = block.find(b"\n", start + SAMPLE_BYTES)
                some = block[start:] if stop < 0 else block[start : stop + 1]
                return some.decode(errors="replace").removesuffix("\n").split("\n")
    return []


def _time_unit(table: TableFormat, files: Sequence[RawFile]) -> str:
    name, left, shown = table.columns["time"], list[str](), ""
    if files[0].suffix == ".parquet":
        kind = parquet(files[0]).schema_arrow.field(name).type
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return "milliseconds"
    alone = replace(table, columns={"time": name})
    for _, _, piece in read_all(files, alone):
        column = as_text(piece.columns["time"].combine_chunks(), {})
        values = list(filter(None, column[:: 1 + len(column) // SAMPLED_TIMES].to_pylist()))
        units = list(time_units(values))
        left = [unit for unit in left if unit in units] or left or units
        shown = shown or next(iter(values), "")
        if len(left) == 1 or "iso8601" in left:
            return left[0]
    if len({unit.replace("%B", "%b") for unit in left}) > 1:
        raise ConfigError(
            f"{files[0].name} has times such as {shown!r}, which may be {' or '.join(left)}; say"
            f" which, such as --set 'data.table.time_unit={left[0]}'"
        )
    return left[0] if left else "seconds"
