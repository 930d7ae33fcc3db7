"""Raw tables to clean values. Every line is used or a `Reject` with its file, line and reason."""

from __future__ import annotations

import html
import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rsllm.data.delimited import COUNT, QUOTES
from rsllm.data.files import Chunk, RawFile, TableFormat
from rsllm.data.pieces import SHOWN, Fault, Piece
from rsllm.data.sequences import SPLITS, Bools
from rsllm.data.tables import read, read_all
from rsllm.data.values import as_text, folded, folded_id, numbers, time_units, times
from rsllm.errors import DataError

TEXT = "text"
"""Start of the roles of further texts of an item."""
_YEAR = re.compile(r"( ?\(([0-9]{4}|V|TV)\))+$")
_ARTICLE = re.compile(r"(^|\()([^()]+), (The|An|A)(?= ?(?:[()]|$))")
_ENTITY = re.compile(r"&(#[0-9]+|#x[0-9a-fA-F]+|[a-zA-Z]+[0-9]*);")
_PLACEHOLDERS = {"unknown", "unkonwn", ""}
"""MovieLens-100K's item 267 has no title; GroupLens and RecBole spell that differently."""
FOLDED, YEARS, ARTICLES = "ids folded", "years taken off", "articles put first"
ENTITIES, NAMELESS = "titles with HTML entities", "items without a title"
Change = tuple[int, str]
"""How many values were changed, or might be, and the first of them by alphabet."""


@dataclass(frozen=True, order=True)
class Reject:
    """A raw line that cannot be used."""

    file: str
    line: int
    """Line in the file (row, in Parquet), counted from 1, headers included."""
    reason: str
    value: str = ""
    """What is wrong with it."""


@dataclass(frozen=True)
class Items:
    """The catalogue as the source has it, by id (numbers by size), and what was refused."""

    ids: list[str]
    titles: list[str]
    rejects: list[Reject] = field(default_factory=list)
    rows_read: int = 0
    other_titles: int = 0
    """Items whose interactions name several titles; the most frequent one is theirs."""
    changes: dict[str, Change] = field(default_factory=dict)

    @classmethod
    def of(cls, titles: Mapping[str, tuple[str, str]], *more: Any, **facts: Any) -> Items:
        """The items with their clean titles, beside which the raw ones stand."""
        ids = sorted(titles, key=lambda item: (len(item), item))
        return cls(ids, [titles[item][0] for item in ids], *more, **facts)


@dataclass(frozen=True)
class Interactions:
    """Some clean lines of a chunk.

    Attributes:
        table: user (string), item (int32 number), time (int64, ms since 1970), and rating
            (float64) and split (int8) where the source has them.
        rejects: of these lines; their `line` counts from 0 at the start of the chunk.
        num_lines: lines of the chunk that were read, the header too.
        changes: what was done to values.
    """

    table: pa.Table
    rejects: list[Reject]
    num_lines: int
    changes: dict[str, Change]


def clean_title(
    title: str,
    item: str,
    *,
    strip_years: bool = True,
    move_articles: bool = True,
    unescape: bool = False,
) -> str:
    """The title as prompts show it: one line, no year, article in front.

    ``"Matrix, The (1999)"`` becomes ``"The Matrix"``; alternative titles in parentheses stay and
    get the same treatment. A title that is empty or a placeholder becomes ``"item <id>"``.
    """
    title = html.unescape(title) if unescape else title
    visible = (" " if unicodedata.category(c) == "Cc" else c for c in title)
    kept = "".join(c for c in visible if unicodedata.category(c) != "Cf")
    name = " ".join(unicodedata.normalize("NFC", kept).split())
    name = _YEAR.sub("", name) if strip_years else name
    name = (_ARTICLE.sub(r"\1\3 \2", name) if move_articles else name).strip()
    return f"item {item}" if name in _PLACEHOLDERS else name


def titled(texts: Sequence[str], item: str, table: TableFormat) -> str:
    """An item's clean title, with its further texts in parentheses."""
    how = {name: getattr(table, name) for name in ("strip_years", "move_articles", "unescape")}
    first, *more = texts
    words = [clean_title(text, "", **how) for text in more if text.strip()]
    title = clean_title(first, item, **how)
    return f"{title} ({', '.join(words)})" if words else title


def merged(changes: Sequence[Mapping[str, Change]]) -> dict[str, Change]:
    """The changes of several parts."""
    total: dict[str, Change] = {}
    for what, (count, example) in (pair for part in changes for pair in part.items()):
        before = total.get(what, (0, example))
        total[what] = (before[0] + count, min(before[1], example))
    return total


def _title_changes(titles: Mapping[str, tuple[str, str]], table: TableFormat) -> dict[str, Change]:
    """What cleaning does to titles, clean and raw by item, and what it might do."""
    raw = [title for _, title in titles.values()]
    found = {
        YEARS: [title for title in raw if table.strip_years and _YEAR.search(title.strip())],
        ARTICLES: [title for title in raw if table.move_articles and _ARTICLE.search(title)],
        ENTITIES: [title for title in raw if _ENTITY.search(title)],
        NAMELESS: [clean for item, (clean, _) in titles.items() if clean == f"item {item}"],
    }
    return {what: (len(some), min(some)) for what, some in found.items() if some}


def _text_roles(table: TableFormat) -> list[str]:
    return [role for role in table.columns if role == "title" or role.startswith(TEXT)]


def _ids(column: pa.Array, table: TableFormat) -> tuple[pa.Array, Bools, dict[str, Change]]:
    """Ids, which of them are missing, and how many are folded."""
    changes: dict[str, Change] = {}
    plain = column
    if table.fold_ids:
        plain, folded_R = folded(column)
        if folded_R.any():
            changed = column.filter(pa.array(folded_R))
            changes[FOLDED] = (len(changed), pc.min(changed).as_py())
    none_R = pc.equal(plain, "")
    if table.missing:
        none_R = pc.or_(none_R, pc.is_in(plain, value_set=pa.array(table.missing, pa.string())))
    return plain, np.asarray(none_R), changes


def read_items(files: Sequence[RawFile], table: TableFormat) -> Items:
    """The titles of all items, one row each; of an item's rows the first one counts.

    Raises:
        DataError: no usable row.
    """
    places: dict[str, tuple[str, str, str]] = {}
    rejects: list[Reject] = []
    rows_read, changes = 0, list[dict[str, Change]]()
    for file, first, piece in read_all(files, table):
        broken = piece.broken | _add_items(places, changes, piece, (file, first, table))
        rejects += [Reject(file.name, first + line, *broken[line]) for line in sorted(broken)]
        rows_read += len(piece.columns) + len(piece.broken)
    if not places:
        at = f"; {_told(rejects[0])}" if rejects else ""
        raise DataError(f"{files[0].name} has no usable row{at}; is it the right file?")
    titles = {item: (title, raw) for item, (title, raw, _) in places.items()}
    changes.append(_title_changes(titles, table))
    return Items.of(titles, rejects, rows_read, changes=merged(changes))


def _add_items(
    places: dict[str, tuple[str, str, str]],
    changes: list[dict[str, Change]],
    piece: Piece,
    where: tuple[RawFile, int, TableFormat],
) -> dict[int, Fault]:
    """Put the rows' clean titles, raw ones and places into `places`; the lines that are refused."""
    file, first, table = where
    no_text: dict[int, str] = {}
    pairs = zip(table.columns, piece.columns.columns, strict=True)
    columns = {role: as_text(column.combine_chunks(), no_text) for role, column in pairs}
    ids, missing_R, folds = _ids(columns["item"], table)
    changes.append(folds)
    broken: dict[int, Fault] = {}
    rows = zip(*(columns[role].to_pylist() for role in _text_roles(table)), strict=True)
    for row, (line, item, texts) in enumerate(zip(piece.lines, ids.to_pylist(), rows, strict=True)):
        if row in no_text:
            broken[line] = (no_text[row], ", ".join([item, *texts])[:SHOWN])
        elif missing_R[row]:
            broken[line] = ("empty id", ", ".join([item, *texts])[:SHOWN])
        elif item in places:
            before, raw, place = places[item]
            title = titled(texts, item, table)
            what = "repeated item" if title == before else "item with a second title"
            broken[line] = (what, f"{item} {texts[0]}, which is {raw} in {place}"[: 2 * SHOWN])
        else:
            place = f"{file.name}:{first + line}"
            places[item] = (titled(texts, item, table), texts[0], place)
    return broken


def titles_beside(chunk: Chunk, table: TableFormat) -> Counter[tuple[str, ...]]:
    """How often the interactions of a chunk give an item (first) which title and further texts."""
    found: Counter[tuple[str, ...]] = Counter()
    roles = ["item", *_text_roles(table)]
    for piece in read(chunk, table):
        rows = piece.columns.select(roles).group_by(roles).aggregate([([], "count_all")])
        for row in rows.to_pylist():
            count, texts = row.pop("count_all"), row.values()
            try:
                plain = [v.decode() if isinstance(v, bytes) else v for v in texts]
            except UnicodeDecodeError:
                continue
            item = folded_id(plain[0]) if table.fold_ids else plain[0]
            if item and item not in table.missing:
                found[item, *plain[1:]] += count
    return found


def settle_titles(counts: Mapping[tuple[str, ...], int], table: TableFormat) -> Items:
    """One title per item: the most frequent one, of equally frequent ones the first by alphabet."""
    by_title: dict[str, dict[str, tuple[int, str]]] = {}
    for (item, *texts), count in counts.items():
        title, held = titled(texts, item, table), by_title.setdefault(item, {})
        before = held.get(title, (0, texts[0]))
        held[title] = (before[0] + count, min(before[1], texts[0]))
    best = {item: min(held, key=lambda t: (-held[t][0], t)) for item, held in by_title.items()}
    titles = {item: (title, by_title[item][title][1]) for item, title in best.items()}
    others, changes = sum(map(len, by_title.values())) - len(best), _title_changes(titles, table)
    return Items.of(titles, other_titles=others, changes=changes)


def read_interactions(
    chunk: Chunk, table: TableFormat, item_ids: pa.Array
) -> Iterator[Interactions]:
    """The interactions of a chunk with items of the catalogue, piece by piece."""
    for piece in read(chunk, table):
        no_text: dict[int, str] = {}
        pairs = zip(table.columns, piece.columns.columns, strict=True)
        columns = {role: as_text(column.combine_chunks(), no_text) for role, column in pairs}
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
            clean["rating"], wrong_R = _ratings(columns["rating"], table.max_rating)
            bad["bad rating", "rating"] = wrong_R
        clean["time"], bad["bad time", "time"] = times(columns["time"], table.time_unit)
        if "split" in columns:
            codes = pc.index_in(columns["split"], value_set=pa.array(SPLITS))
            clean["split"] = codes.cast(pa.int8())
            bad["bad split", "split"] = np.asarray(codes.is_null())
        bad["unknown item", "item"] = np.asarray(numbers_R.is_null())
        bad_CR = np.stack(list(bad.values()))
        bad_R, first_R, faults = bad_CR.any(axis=0), bad_CR.argmax(axis=0), list(bad)
        found = dict(piece.broken)
        for row in np.flatnonzero(bad_R).tolist():
            reason, role = faults[first_R[row]]
            value = columns[role][row].as_py()
            found[piece.lines[row]] = (no_text.get(row, reason), value[:SHOWN])
        rejects = [Reject(chunk.file.name, line, *found[line]) for line in sorted(found)]
        rows = pa.table(clean).filter(pa.array(~bad_R))
        yield Interactions(rows, rejects, piece.num_lines, merged([folds, more_folds]))


def _ratings(column: pa.Array, highest: float) -> tuple[NDArray[np.float64], Bools]:
    values_R, bad_R = numbers(column)
    if highest:
        bad_R |= (values_R < 0) | (values_R > highest)
    return values_R, bad_R


def check_rejects(
    rejects: Sequence[Reject],
    rows_read: int,
    allowed: int,
    listed: Path,
    hint: str = "",
    useless: bool = False,
) -> None:
    """Write the rejects to `listed`, one JSON object a line, and refuse too many of them.

    Raises:
        DataError: more than `allowed`, with the most frequent reason's first value, and the way
            out; what is `useless` without them has none but the hint.
    """
    if rejects:
        lines = (json.dumps(asdict(reject), sort_keys=True) for reject in rejects)
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{line}\n" for line in lines))
    if len(rejects) > (0 if useless else allowed):
        reasons = Counter(reject.reason for reject in rejects)
        summary = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(9))
        more = f" To go on without them: --set data.max_rejected_rows={len(rejects)}"
        raise DataError(
            f"{len(rejects):,} of {rows_read:,} rows rejected ({summary});"
            f" {_told(most_frequent(rejects))}{hint}; all: {listed}.{'' if useless else more}"
        )


def most_frequent(rejects: Sequence[Reject]) -> Reject:
    """The first reject of the most frequent reason."""
    ((reason, _),) = Counter(reject.reason for reject in rejects).most_common(1)
    return next(reject for reject in rejects if reject.reason == reason)


def _told(reject: Reject) -> str:
    return f"{reject.reason}: {reject.value!r} in {reject.file}:{reject.line}"


def hint_of(reject: Reject, table: TableFormat, items: Items, items_file: str) -> str:
    """What would have the line read, as far as its value tells."""
    match reject.reason:
        case "bad time":
            fits = [unit for unit in time_units([reject.value]) if unit != table.time_unit]
            if not fits:
                return f"; say its format, such as {setting('time_unit', '%d/%m/%Y')}"
            return f"; looks like {fits[0]}: {setting('time_unit', fits[0])}"
        case "unknown item" if items.ids:
            near = _near(reject.value, items.ids)
            own = f"{near!r}" if near else f"ids such as {items.ids[0]!r}"
            fold = near == folded_id(reject.value) and near != reject.value
            way = f": {setting('fold_ids', 'true')} makes them one" if fold else ""
            return f"; {items_file or 'the catalogue'} has {own}{way}"
        case reason if reason in (COUNT, QUOTES) and table.quote and table.quote in reject.value:
            return f"; where quotes are just text: {setting('quote', 'none')}"
        case reason if reason.startswith("undecodable text"):
            return f"; if it is not {table.encoding}: {setting('encoding', 'cp1252')}"
        case "bad rating":
            return f"; choose a number{f' from 0 to {table.max_rating:g}' * bool(table.max_rating)}"
        case "bad split":
            return f"; choose {', '.join(SPLITS)}"
        case "no JSON object":
            return "; write one object a line, or one array of them"
    return ""


def setting(name: str, value: str) -> str:
    """A setting of `data.table` as the command line says it."""
    value = json.dumps(value) if value.isdigit() else value  # which JSON would make a number
    return f"--set {shlex.quote(f'data.table.{name}={value}')}"


def _near(value: str, ids: Sequence[str]) -> str:
    """The catalogue's spelling of an id, if it has one."""

    def plain(text: str) -> str:
        return folded_id(text.strip()).lstrip("0").casefold()

    return next((item for item in ids if plain(item) == plain(value)), "")
