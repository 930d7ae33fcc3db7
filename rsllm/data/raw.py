"""Raw tables to clean values. Every line is used or a `Reject` with its file, line and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rsllm.data.files import SHOWN, Chunk, Fault, RawFile, Reject, TableFormat
from rsllm.data.sequences import SPLITS, Bools
from rsllm.data.tables import read, read_all
from rsllm.data.titles import Change, item_title, title_changes
from rsllm.data.values import as_text, fold_ids, numbers, times
from rsllm.errors import DataError

TEXT = "text"
"""Start of the roles of further texts of an item."""
FOLDED = "ids folded"


@dataclass(frozen=True)
class RawItems:
    """The catalogue as the source has it, by id (numbers by size), and what was refused."""

    ids: list[str]
    titles: list[str]
    rejects: list[Reject] = field(default_factory=list)
    rows_read: int = 0
    other_titles: int = 0
    """Items whose interactions name several titles; the most frequent one is theirs."""
    changes: dict[str, Change] = field(default_factory=dict)

    @classmethod
    def of(cls, titles: Mapping[str, tuple[str, str]], *more: Any, **facts: Any) -> RawItems:
        """Return the items with their clean titles, beside which the raw ones stand."""
        ids = sorted(titles, key=lambda item: (len(item), item))
        return cls(ids, [titles[item][0] for item in ids], *more, **facts)


@dataclass(frozen=True)
class Interactions:
    """Some clean lines of a chunk.

    Attributes:
        table: user (string), item (int32 number), time (int64, ms since 1970), and rating
            (float64) and split (int8) where the source has them.
        broken: the lines that cannot be used, from 0 at the start of the chunk, in order.
        num_lines: lines of the chunk that were read, the header too.
        changes: of values, by kind.
    """

    table: pa.Table
    broken: dict[int, Fault]
    num_lines: int
    changes: dict[str, Change]


def sum_changes(changes: Sequence[Mapping[str, Change]]) -> dict[str, Change]:
    """Return the sum of the changes of several parts."""
    total: dict[str, Change] = {}
    for what, (count, example) in (pair for part in changes for pair in part.items()):
        before = total.get(what, (0, example))
        total[what] = (before[0] + count, min(before[1], example))
    return total


def _text_roles(table: TableFormat) -> list[str]:
    return [role for role in table.columns if role == "title" or role.startswith(TEXT)]


def _texts(rows: pa.Table) -> tuple[dict[str, pa.Array], dict[int, str]]:
    """Return the columns of some rows by role, and the reason of each row that is not all text."""
    no_text: dict[int, str] = {}
    columns = {role: rows[role].combine_chunks() for role in rows.column_names}
    return {role: as_text(column, no_text) for role, column in columns.items()}, no_text


def _ids(column: pa.Array, table: TableFormat) -> tuple[pa.Array, Bools, dict[str, Change]]:
    """Ids, which of them are missing, and how many are folded."""
    changes: dict[str, Change] = {}
    plain = column
    if table.fold_ids:
        plain, folded_R = fold_ids(column)
        if folded_R.any():
            changed = column.filter(pa.array(folded_R))
            changes[FOLDED] = (len(changed), pc.min(changed).as_py())
    missing = pa.array(["", *table.missing], pa.string())
    return plain, np.asarray(pc.is_in(plain, value_set=missing)), changes


def read_items(files: Sequence[RawFile], table: TableFormat) -> RawItems:
    """Return the titles of all items, one row each; of an item's rows the first one counts.

    Raises:
        DataError: no usable row.
    """
    titles: dict[str, tuple[str, str]] = {}
    places: dict[str, str] = {}
    rejects: list[Reject] = []
    rows_read, changes = 0, list[dict[str, Change]]()
    for file, first, piece in read_all(files, table):
        columns, no_text = _texts(piece.columns)
        ids, missing_R, folds = _ids(columns["item"], table)
        changes.append(folds)
        broken = dict(piece.broken)
        texts_R = zip(*(columns[role].to_pylist() for role in _text_roles(table)), strict=True)
        rows = zip(piece.lines, ids.to_pylist(), texts_R, strict=True)
        for row, (line, item, texts) in enumerate(rows):
            if row in no_text or missing_R[row]:
                shown = ", ".join([item, *texts])[:SHOWN]
                broken[line] = (no_text.get(row, "empty id"), shown)
                continue
            title = item_title(texts, item, table)
            if item in titles:
                before, raw = titles[item]
                what = "repeated item" if title == before else "item with a second title"
                shown = f"{item} {texts[0]}, which is {raw} in {places[item]}"
                broken[line] = (what, shown[: 2 * SHOWN])
            else:
                titles[item], places[item] = (title, texts[0]), f"{file.name}:{first + line}"
        rejects += [Reject(file.name, first + line, *broken[line]) for line in sorted(broken)]
        rows_read += len(piece.columns) + len(piece.broken)
    if not titles:
        at = f"; {rejects[0]}" if rejects else ""
        raise DataError(f"{files[0].name} has no usable row{at}; is it the right file?")
    changes.append(title_changes(titles, table))
    return RawItems.of(titles, rejects, rows_read, changes=sum_changes(changes))


def titles_beside(chunk: Chunk, table: TableFormat) -> Counter[tuple[str, ...]]:
    """Count how often the interactions of a chunk give an item which title and further texts."""
    counts: Counter[tuple[str, ...]] = Counter()
    roles = ["item", *_text_roles(table)]
    for piece in read(chunk, table):
        rows = piece.columns.select(roles).group_by(roles).aggregate([([], "count_all")])
        columns, no_text = _texts(rows.select(roles))
        columns["item"], missing_R, _ = _ids(columns["item"], table)
        texts_R = zip(*(column.to_pylist() for column in columns.values()), strict=True)
        for row, (texts, count) in enumerate(zip(texts_R, rows["count_all"], strict=True)):
            if row not in no_text and not missing_R[row]:
                counts[texts] += count.as_py()
    return counts


def settle_titles(counts: Mapping[tuple[str, ...], int], table: TableFormat) -> RawItems:
    """One title per item: the most frequent one, of equally frequent ones the first by alphabet."""
    by_title: dict[str, dict[str, tuple[int, str]]] = {}
    for (item, *texts), count in counts.items():
        title, held = item_title(texts, item, table), by_title.setdefault(item, {})
        before = held.get(title, (0, texts[0]))
        held[title] = (before[0] + count, min(before[1], texts[0]))
    best = {item: min(held, key=lambda t: (-held[t][0], t)) for item, held in by_title.items()}
    titles = {item: (title, by_title[item][title][1]) for item, title in best.items()}
    others, changes = sum(map(len, by_title.values())) - len(best), title_changes(titles, table)
    return RawItems.of(titles, other_titles=others, changes=changes)


def read_interactions(
    chunk: Chunk, table: TableFormat, item_ids: pa.Array
) -> Iterator[Interactions]:
    """Yield the interactions of a chunk with items of the catalogue, piece by piece."""
    for piece in read(chunk, table):
        columns, no_text = _texts(piece.columns)
        users, no_user_R, folds = _ids(columns["user"], table)
        items, no_item_R, more_folds = _ids(columns["item"], table)
        numbers_R = pc.index_in(items, value_set=item_ids)
        clean = {"user": users, "item": numbers_R}
        bad: dict[tuple[str, str], Bools] = {
            ("", "user"): np.isin(np.arange(len(piece.columns)), list(no_text)),
            ("empty id", "user"): no_user_R,
            ("empty id", "item"): no_item_R,
        }
        if "rating" in columns:
            values_R, wrong_R = numbers(columns["rating"])
            if table.max_rating:
                wrong_R |= (values_R < 0) | (values_R > table.max_rating)
            clean["rating"], bad["bad rating", "rating"] = values_R, wrong_R
        clean["time"], bad["bad time", "time"] = times(columns["time"], table.time_unit)
        if "split" in columns:
            codes = pc.index_in(columns["split"], value_set=pa.array(SPLITS))
            clean["split"] = codes.cast(pa.int8())
            bad["bad split", "split"] = np.asarray(codes.is_null())
        bad["unknown item", "item"] = np.asarray(numbers_R.is_null())
        bad_CR = np.stack(list(bad.values()))
        bad_R, first_R, faults = bad_CR.any(axis=0), bad_CR.argmax(axis=0), list(bad)
        broken = dict(piece.broken)
        for row in np.flatnonzero(bad_R).tolist():
            reason, role = faults[first_R[row]]
            value = columns[role][row].as_py()
            broken[piece.lines[row]] = (no_text.get(row, reason), value[:SHOWN])
        rows = pa.table(clean).filter(pa.array(~bad_R))
        changes = sum_changes([folds, more_folds])
        yield Interactions(rows, dict(sorted(broken.items())), piece.num_lines, changes)
