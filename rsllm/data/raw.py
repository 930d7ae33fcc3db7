"""Raw MovieLens files, as GroupLens or RecBole ships them, to clean tables.

Every line is either used or a `Reject` with its file, line and reason; none is lost in silence.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd

from rsllm.errors import ConfigError, DataError

T = TypeVar("T")

MAX_RATING = 5.0
MAX_TIME = 2**32
"""Seconds since 1970 (year 2106); beyond it a time is in another unit."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_INTEGER = re.compile(r"[0-9]{1,10}")
_YEAR = re.compile(r"( ?\(([0-9]{4}|V|TV)\))+$")
_ARTICLE = re.compile(r"(^|\()([^()]+), (The|An|A)(?= ?(?:[()]|$))")
_PLACEHOLDERS = {"unknown", "unkonwn"}
"""MovieLens-100K's item 267 has no title; GroupLens and RecBole spell that differently."""


@dataclass(frozen=True)
class Reject:
    """A raw line that cannot be used."""

    file: str
    line: int
    """Line in the file, counted from 1, headers included."""
    reason: str


@dataclass(frozen=True)
class RawData:
    """Clean tables, in file order, and what was refused.

    Attributes:
        interactions: columns user (str), item (str), rating (float64), time (int64, seconds).
        items: columns id (str), title (str); ids are distinct.
        rejects: the refused lines of both files.
        rows_read: data lines of both files, used or refused.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    rejects: list[Reject]
    rows_read: int


@dataclass(frozen=True)
class _File:
    name: str
    separator: str
    columns: int
    encoding: str = "utf-8"
    header: str | None = None


@dataclass(frozen=True)
class _Layout:
    interactions: _File
    items: _File


_LAYOUTS = (
    _Layout(
        _File("u.data", "\t", columns=4),
        _File("u.item", "|", columns=24, encoding="latin-1"),
    ),
    _Layout(
        _File(
            "ml-100k.inter",
            "\t",
            columns=4,
            header="user_id:token\titem_id:token\trating:float\ttimestamp:float",
        ),
        _File(
            "ml-100k.item",
            "\t",
            columns=4,
            header="item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        ),
    ),
)


class _BrokenRow(ValueError):
    """Its message is the reason a line is refused."""


def raw_files(folder: Path) -> list[Path]:
    """The files `read` would read in `folder`.

    Raises:
        ConfigError: the folder holds neither layout.
    """
    layout = _layout(folder)
    return [folder / layout.interactions.name, folder / layout.items.name]


def read(folder: Path, *, max_rejected_rows: int) -> RawData:
    """Read the interactions and items in `folder`, in GroupLens' or RecBole's layout.

    Raises:
        ConfigError: the folder holds neither layout.
        DataError: more than `max_rejected_rows` broken lines, an item with two titles, a header
            that is not the layout's, or no usable line.
    """
    layout, rejects = _layout(folder), list[Reject]()
    titles: dict[str, str] = {}
    items = _parse(folder, layout.items, lambda fields: _item(fields, titles), rejects)
    interactions = _parse(
        folder, layout.interactions, lambda fields: _interaction(fields, titles), rejects
    )
    rows_read = len(items) + len(interactions) + len(rejects)
    _check_rejects(rejects, rows_read, max_rejected_rows)
    for file, rows in ((layout.items, items), (layout.interactions, interactions)):
        if not rows:
            raise DataError(f"{folder / file.name} has no usable row; is it the right file?")
    return RawData(
        pd.DataFrame(interactions, columns=["user", "item", "rating", "time"]),
        pd.DataFrame(items, columns=["id", "title"]),
        rejects,
        rows_read,
    )


def clean_title(title: str, item: str) -> str:
    """The title as prompts show it: one line, no year, article in front.

    ``"Matrix, The (1999)"`` becomes ``"The Matrix"``; alternative titles in parentheses stay and
    get the same treatment. A title that is empty or a placeholder becomes ``"item <id>"``.
    """
    visible = (" " if unicodedata.category(c) == "Cc" else c for c in title)
    kept = "".join(c for c in visible if unicodedata.category(c) != "Cf")
    line = " ".join(unicodedata.normalize("NFC", kept).split())
    name = _ARTICLE.sub(r"\1\3 \2", _YEAR.sub("", line)).strip()
    return f"item {item}" if name in _PLACEHOLDERS or not name else name


def _layout(folder: Path) -> _Layout:
    for layout in _LAYOUTS:
        if all((folder / file.name).is_file() for file in (layout.interactions, layout.items)):
            return layout
    pairs = " or ".join(f"{x.interactions.name} and {x.items.name}" for x in _LAYOUTS)
    raise ConfigError(f"{folder} holds no raw data; looked for {pairs}")


def _parse(
    folder: Path, file: _File, parse: Callable[[list[str]], T], rejects: list[Reject]
) -> list[T]:
    rows = []
    for line, raw in _lines(folder / file.name, file.header):
        try:
            rows.append(parse(_fields(raw, file)))
        except _BrokenRow as broken:
            rejects.append(Reject(file.name, line, str(broken)))
    return rows


def _lines(path: Path, header: str | None) -> Iterator[tuple[int, bytes]]:
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    numbered = ((number, line.removesuffix(b"\r")) for number, line in enumerate(lines, start=1))
    if header is not None:
        _, first = next(numbered, (1, b""))
        if first != header.encode():
            raise DataError(f"{path} starts with {first[:80]!r}; expected the header {header!r}")
    return numbered


def _fields(raw: bytes, file: _File) -> list[str]:
    try:
        fields = raw.decode(file.encoding).split(file.separator)
    except UnicodeDecodeError as error:
        raise _BrokenRow("undecodable text") from error
    if len(fields) != file.columns:
        raise _BrokenRow("wrong column count")
    return fields


def _item(fields: list[str], titles: dict[str, str]) -> tuple[str, str]:
    item, title = fields[0], clean_title(fields[1], fields[0])
    if not item:
        raise _BrokenRow("empty id")
    known = titles.get(item, title)
    if known != title:
        raise DataError(f"item {item} has two titles, {known!r} and {title!r}; keep one of them")
    if item in titles:
        raise _BrokenRow("repeated item")
    titles[item] = title
    return item, title


def _interaction(fields: list[str], titles: dict[str, str]) -> tuple[str, str, float, int]:
    user, item, rating, time = fields
    if not user or not item:
        raise _BrokenRow("empty id")
    if not _NUMBER.fullmatch(rating) or float(rating) > MAX_RATING:
        raise _BrokenRow("bad rating")
    if not _INTEGER.fullmatch(time) or int(time) > MAX_TIME:
        raise _BrokenRow("bad time")
    if item not in titles:
        raise _BrokenRow("unknown item")
    return user, item, float(rating), int(time)


def _check_rejects(rejects: list[Reject], rows_read: int, allowed: int) -> None:
    if len(rejects) <= allowed:
        return
    reasons = Counter(reject.reason for reject in rejects)
    summary = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    first = rejects[0]
    raise DataError(
        f"{len(rejects):,} of {rows_read:,} rows rejected ({summary}); first:"
        f" {first.file}:{first.line} {first.reason}. Allowed: {allowed:,}."
        " Raise data.max_rejected_rows to continue."
    )
