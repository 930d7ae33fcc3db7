"""Raw tables to clean values. Every line is used or a `Reject` with its file, line and reason."""

from __future__ import annotations

import json
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
from rsllm.data.titles import clean_title
from rsllm.errors import DataError

TEXT = "text"
"""Start of the roles of further texts of an item."""
MAX_TIME = 2**32
"""Seconds since 1970 (year 2106); beyond it a time is in another unit."""
_UNITS: dict[TimeUnit, float] = {"seconds": 1.0, "milliseconds": 1e3}


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

    def index(self) -> pa.Array:
        """The ids, in the order of their numbers."""
        return pa.array(self.ids, pa.string())


@dataclass(frozen=True)
class Interactions:
    """Some clean lines of a chunk.

    Attributes:
        table: user (string), item (int32 number), time (int64, seconds since 1970), and rating
            (float64) and split (int8) where the source has them.
        rejects: of these lines; their `line` counts from 0 at the start of the chunk.
        num_lines: lines of the chunk that were read, the header too.
    """

    table: pa.Table
    rejects: list[Reject]
    num_lines: int


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
    ids = sorted(titles, key=by_size)
    return Items(ids, [titles[item] for item in ids], rejects, rows_read)


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
    ids = sorted(best, key=by_size)
    return Items(ids, [best[item][1] for item in ids], [], 0, len(counts) - len(ids))


def by_size(item: str) -> tuple[int, str]:
    """Orders ids: numbers by value, whatever the order of the file."""
    return len(item), item


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
        if titles.setdefault(item, title) != title:
            raise DataError(
                f"item {item} has two titles, {titles[item]!r} and {title!r}; keep one of them"
            )
    titles.pop("", None)
    return broken


def titled(row: Mapping[str, str | bytes]) -> tuple[str, str]:
    """A row's item id and its clean title, with the further texts in parentheses."""
    text = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    title = clean_title(text["title"], text["item"])
    words = [clean_title(v, "") for k, v in text.items() if k.startswith(TEXT) and v.strip()]
    return text["item"], f"{title} ({', '.join(words)})" if words else title


def read_interactions(chunk: Chunk, table: Table, item_ids: pa.Array) -> Iterator[Interactions]:
    """The interactions of a chunk with items of the catalogue, piece by piece."""
    for piece in read(chunk, table):
        columns, checks = _decoded(piece)
        numbers = pc.index_in(columns["item"], value_set=item_ids)
        checks.refuse(_empty(columns["user"]) | _empty(columns["item"]), "empty id")
        clean = {"user": columns["user"], "item": numbers}
        if "rating" in columns:
            clean["rating"] = _ratings(columns["rating"], table.max_rating, checks)
        clean["time"] = _times(columns["time"], table.time_unit, checks)
        if "split" in columns:
            clean["split"] = _splits(columns["split"], checks)
        checks.refuse(np.asarray(numbers.is_null()), "unknown item")
        rows = pa.table(clean).filter(pa.array(checks.good))
        yield Interactions(rows, checks.rejects(piece, chunk.file), piece.num_lines)


class _Checks:
    """The first reason to refuse each row."""

    def __init__(self, size: int) -> None:
        self.reason_R = np.zeros(size, np.int8)
        self.reasons = [""]

    def refuse(self, bad_R: Bools, reason: str) -> None:
        self.reasons.append(reason)
        self.reason_R[bad_R & (self.reason_R == 0)] = len(self.reasons) - 1

    @property
    def good(self) -> Bools:
        good_R: Bools = self.reason_R == 0
        return good_R

    def rejects(self, piece: Piece, file: File) -> list[Reject]:
        found = {piece.lines[i]: self.reasons[self.reason_R[i]] for i in np.flatnonzero(~self.good)}
        found |= piece.broken
        return [Reject(file.name, line, found[line]) for line in sorted(found)]


def _decoded(piece: Piece) -> tuple[dict[str, pa.Array], _Checks]:
    columns, checks = {}, _Checks(len(piece.columns))
    for role in piece.columns.column_names:
        column = piece.columns[role].combine_chunks()
        try:
            columns[role] = column.cast(pa.string())
        except pa.ArrowInvalid:
            texts = [value.decode(errors="replace") for value in column.to_pylist()]
            columns[role] = pa.array(texts, pa.string())
            good_R = columns[role].cast(pa.binary()).equals(column) or pc.equal(
                columns[role].cast(pa.binary()), column
            )
            checks.refuse(~np.asarray(good_R), "undecodable text")
    return columns, checks


def _empty(column: pa.Array) -> Bools:
    return np.asarray(pc.equal(pc.binary_length(column), 0))


def _numbers(column: pa.Array) -> tuple[NDArray[np.float64], Bools]:
    """The values of a column, and which of them are finite numbers."""
    try:
        values_R = np.asarray(column.cast(pa.float64()))
    except pa.ArrowInvalid:
        values_R = np.asarray(pd.to_numeric(column.to_pandas(), errors="coerce"), np.float64)
    return values_R, np.isfinite(values_R)


def _ratings(column: pa.Array, highest: float, checks: _Checks) -> NDArray[np.float64]:
    values_R, good_R = _numbers(column)
    if np.isfinite(highest):
        good_R = good_R & (values_R >= 0) & (values_R <= highest)
    checks.refuse(~good_R, "bad rating")
    return values_R


def _times(column: pa.Array, unit: TimeUnit, checks: _Checks) -> NDArray[np.int64]:
    if unit == "iso8601":
        stamps = pd.to_datetime(column.to_pandas(), errors="coerce", format="ISO8601", utc=True)
        seconds_R = stamps.to_numpy("datetime64[s]").astype(np.int64).astype(np.float64)
        good_R = stamps.notna().to_numpy()
    else:
        seconds_R, good_R = _numbers(column)
        seconds_R = seconds_R / _UNITS[unit]
    good_R = good_R & (seconds_R >= 0) & (seconds_R <= MAX_TIME)
    checks.refuse(~good_R, "bad time")
    return np.where(good_R, seconds_R, 0).astype(np.int64)


def _splits(column: pa.Array, checks: _Checks) -> NDArray[np.int8]:
    codes = pc.fill_null(pc.index_in(column, value_set=pa.array(SPLITS)), -1)
    split_R = np.asarray(codes).astype(np.int8)
    checks.refuse(split_R < 0, "bad split")
    return split_R


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
