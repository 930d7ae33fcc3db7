"""Raw tables to clean values. Every line is used or a `Reject` with its file, line and reason."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rsllm.config import TimeUnit
from rsllm.data.files import Chunk, File, Table
from rsllm.data.sequences import SPLITS, Bools
from rsllm.data.tables import Piece, read, read_all
from rsllm.errors import DataError

TEXT = "text"
"""Start of the roles of further texts of an item."""
MAX_TIME = 2**32 * 1000
"""Milliseconds since 1970 (year 2106); beyond it a time is in another unit."""
_YEAR = re.compile(r"( ?\(([0-9]{4}|V|TV)\))+$")
_ARTICLE = re.compile(r"(^|\()([^()]+), (The|An|A)(?= ?(?:[()]|$))")
_PLACEHOLDERS = {"unknown", "unkonwn", ""}
"""MovieLens-100K's item 267 has no title; GroupLens and RecBole spell that differently."""


@dataclass(frozen=True, order=True)
class Reject:
    """A raw line that cannot be used."""

    file: str
    line: int
    """Line in the file (row, in Parquet), counted from 1, headers included."""
    reason: str


@dataclass(frozen=True)
class Items:
    """The catalogue as the source has it, by id (numbers by size), and what was refused."""

    ids: list[str]
    titles: list[str]
    rejects: list[Reject]
    rows_read: int
    other_titles: int = 0
    """Items whose interactions name several titles; the most frequent one is theirs."""

    @classmethod
    def of(
        cls, titles: Mapping[str, str], rejects: list[Reject], rows_read: int, other_titles: int = 0
    ) -> Items:
        """The items with the titles of their ids."""
        ids = sorted(titles, key=lambda item: (len(item), item))
        return cls(ids, [titles[item] for item in ids], rejects, rows_read, other_titles)


@dataclass(frozen=True)
class Interactions:
    """Some clean lines of a chunk.

    Attributes:
        table: user (string), item (int32 number), time (int64, ms since 1970), and rating
            (float64) and split (int8) where the source has them.
        rejects: of these lines; their `line` counts from 0 at the start of the chunk.
        num_lines: lines of the chunk that were read, the header too.
    """

    table: pa.Table
    rejects: list[Reject]
    num_lines: int


def clean_title(title: str, item: str) -> str:
    """The title as prompts show it: one line, no year, article in front.

    ``"Matrix, The (1999)"`` becomes ``"The Matrix"``; alternative titles in parentheses stay and
    get the same treatment. A title that is empty or a placeholder becomes ``"item <id>"``.
    """
    visible = (" " if unicodedata.category(c) == "Cc" else c for c in title)
    kept = "".join(c for c in visible if unicodedata.category(c) != "Cf")
    line = " ".join(unicodedata.normalize("NFC", kept).split())
    name = _ARTICLE.sub(r"\1\3 \2", _YEAR.sub("", line)).strip()
    return f"item {item}" if name in _PLACEHOLDERS else name


def titled(row: Mapping[str, str | bytes]) -> tuple[str, str]:
    """A row's item id and its clean title, with the further texts in parentheses."""
    text = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    title = clean_title(text["title"], text["item"])
    words = [clean_title(v, "") for k, v in text.items() if k.startswith(TEXT) and v.strip()]
    return text["item"], f"{title} ({', '.join(words)})" if words else title


def read_items(files: Sequence[File], table: Table) -> Items:
    """The titles of all items, one row each.

    Raises:
        DataError: an item with two titles, or no usable row.
    """
    titles: dict[str, str] = {}
    rejects: list[Reject] = []
    rows_read = 0
    for file, first, piece in read_all(files, table):
        broken = piece.broken | _add_items(titles, piece)
        rejects += [Reject(file.name, first + line, broken[line]) for line in sorted(broken)]
        rows_read += len(piece.columns) + len(piece.broken)
    if not titles:
        raise DataError(f"{files[0].name} has no usable row; is it the right file?")
    return Items.of(titles, rejects, rows_read)


def _add_items(titles: dict[str, str], piece: Piece) -> dict[int, str]:
    """Put the rows' titles into `titles`; the lines that are refused, and why."""
    broken: dict[int, str] = {}
    for line, row in zip(piece.lines, piece.columns.to_pylist(), strict=True):
        try:
            item, title = titled(row)
        except UnicodeDecodeError as error:
            broken[line] = f"undecodable text at byte {error.start} of a field"
            continue
        if not item or item in titles:
            broken[line] = "repeated item" if item else "empty id"
        if item and titles.setdefault(item, title) != title:
            raise DataError(
                f"item {item} has two titles, {titles[item]!r} and {title!r}; keep one of them"
            )
    return broken


def titles_beside(chunk: Chunk, table: Table) -> Counter[tuple[str, str]]:
    """How often the interactions of a chunk give an item which title; broken lines do not count."""
    found: Counter[tuple[str, str]] = Counter()
    roles = [role for role in table.columns if role in ("item", "title") or role.startswith(TEXT)]
    for piece in read(chunk, table):
        rows = piece.columns.select(roles).group_by(roles).aggregate([([], "count_all")])
        for row in rows.to_pylist():
            count = row.pop("count_all")
            try:
                found[titled(row)] += count
            except UnicodeDecodeError:
                continue
    return found


def settle_titles(counts: Mapping[tuple[str, str], int]) -> Items:
    """One title per item: the most frequent one, of equally frequent ones the first by alphabet."""
    best: dict[str, tuple[int, str]] = {}
    for (item, title), count in counts.items():
        best[item] = min(best.get(item, (1, "")), (-count, title))
    best.pop("", None)
    titles = {item: title for item, (_, title) in best.items()}
    return Items.of(titles, [], 0, len(counts) - len(titles))


def read_interactions(chunk: Chunk, table: Table, item_ids: pa.Array) -> Iterator[Interactions]:
    """The interactions of a chunk with items of the catalogue, piece by piece."""
    for piece in read(chunk, table):
        no_text: dict[int, str] = {}
        pairs = zip(table.columns, piece.columns.columns, strict=True)
        columns = {role: as_text(column.combine_chunks(), no_text) for role, column in pairs}
        bad: dict[str, Bools] = {"": np.isin(np.arange(len(piece.columns)), list(no_text))}
        numbers = pc.index_in(columns["item"], value_set=item_ids)
        bad["empty id"] = np.any([pc.equal(columns[role], "") for role in ("user", "item")], axis=0)
        clean = {"user": columns["user"], "item": numbers}
        if "rating" in columns:
            clean["rating"], bad["bad rating"] = _ratings(columns["rating"], table.max_rating)
        clean["time"], bad["bad time"] = _times(columns["time"], table.time_unit)
        if "split" in columns:
            codes = pc.index_in(columns["split"], value_set=pa.array(SPLITS))
            clean["split"] = codes.cast(pa.int8())
            bad["bad split"] = np.asarray(codes.is_null())
        bad["unknown item"] = np.asarray(numbers.is_null())
        bad_CR = np.stack(list(bad.values()))
        bad_R, first_R, reasons = bad_CR.any(axis=0), bad_CR.argmax(axis=0), list(bad)
        found = {piece.lines[i]: reasons[first_R[i]] for i in np.flatnonzero(bad_R)} | piece.broken
        found |= {piece.lines[i]: reason for i, reason in no_text.items()}
        rejects = [Reject(chunk.file.name, line, found[line]) for line in sorted(found)]
        yield Interactions(pa.table(clean).filter(pa.array(~bad_R)), rejects, piece.num_lines)


def as_text(column: pa.Array, no_text: dict[int, str]) -> pa.Array:
    """A column as strings; `no_text` takes the rows that are no UTF-8, and why."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = column.to_pylist()
    for row, value in enumerate(values):
        try:
            values[row] = value.decode()
        except UnicodeDecodeError as error:
            values[row] = value.decode(errors="replace")
            no_text[row] = f"undecodable text at byte {error.start} of a field"
    return pa.array(values)


def _numbers(column: pa.Array) -> tuple[NDArray[np.float64], Bools]:
    """The values of a column, and which of them are no finite numbers."""
    try:
        values_R = np.asarray(column.cast(pa.float64()))
    except pa.ArrowInvalid:
        values_R = np.asarray(pd.to_numeric(column.to_pandas(), errors="coerce"), np.float64)
    return values_R, ~np.isfinite(values_R)


def _ratings(column: pa.Array, highest: float) -> tuple[NDArray[np.float64], Bools]:
    values_R, bad_R = _numbers(column)
    if np.isfinite(highest):
        bad_R |= (values_R < 0) | (values_R > highest)
    return values_R, bad_R


def _times(column: pa.Array, unit: TimeUnit) -> tuple[NDArray[np.int64], Bools]:
    if unit == "iso8601":
        stamps = pd.to_datetime(column.to_pandas(), errors="coerce", format="ISO8601", utc=True)
        time_R = stamps.to_numpy("datetime64[ms]").astype(np.int64).astype(np.float64)
        bad_R = stamps.isna().to_numpy()
    else:
        time_R, bad_R = _numbers(column)
        time_R = time_R * (1.0 if unit == "milliseconds" else 1e3)
    bad_R = bad_R | (time_R < 0) | (time_R > MAX_TIME)
    return np.where(bad_R, 0, time_R).round().astype(np.int64), bad_R


def check_rejects(rejects: Sequence[Reject], rows_read: int, allowed: int, listed: Path) -> None:
    """Write the rejects to `listed`, one JSON object a line, and refuse too many of them.

    Raises:
        DataError: more than `allowed`.
    """
    if rejects:
        lines = (json.dumps(asdict(reject), sort_keys=True) for reject in rejects)
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{line}\n" for line in lines))
    if len(rejects) > allowed:
        reasons = Counter(reject.reason for reject in rejects)
        summary = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(9))
        first = rejects[0]
        raise DataError(
            f"{len(rejects):,} of {rows_read:,} rows rejected ({summary}); first:"
            f" {first.file}:{first.line} {first.reason}; all: {listed}. Allowed: {allowed:,}."
            " Raise data.max_rejected_rows to continue."
        )
