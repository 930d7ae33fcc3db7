"""Raw layouts: which files a source has, and what their columns mean.

A new one is a TOML file like those beside this one, and its name in `FILES`. RecBole's atomic files
(https://recbole.io/docs/user_guide/data/atomic_files.html) and tables whose columns `data.table`
names say more of themselves and are read here.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from rsllm.config import Domain, TableConfig
from rsllm.data.files import File, Table, find_files
from rsllm.data.raw import TEXT
from rsllm.data.tables import columns_of
from rsllm.errors import ConfigError, DataError

FILES = ("movielens", "llara", "lastfm", "steam", "synthetic")
TITLES = ("movie_title:token_seq", "title:token_seq", "name:token_seq")
RATING = "rating:float"
SEPARATORS = {".csv": ",", ".tsv": "\t", ".parquet": "", ".json": "", ".jsonl": ""}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A raw layout.

    Attributes:
        name: what users call it.
        interactions: user, item, time, and rating if there is one.
        items: item and title; None: the titles stand beside the interactions.
        domain: decides the prompts' wording.
        family: sources of one family hold the same users and must not be mixed.
        marker: a further file that tells this layout from another of the same names.
        timed: whether its times are times; else they are places in a user's sequence.
    """

    name: str
    interactions: Table
    items: Table | None = None
    domain: Domain = "item"
    family: str = ""
    marker: str = ""
    timed: bool = True

    def patterns(self) -> list[str]:
        """The files it needs."""
        return [table.files for table in (self.interactions, self.items) if table]


@dataclass(frozen=True)
class RawData:
    """A source and its files."""

    source: Source
    interactions: Sequence[File]
    items: Sequence[File]


def _load(file: str) -> Iterator[Source]:
    facts = tomllib.loads(Path(__file__).with_name(f"{file}.toml").read_text())
    for entry in facts.pop("source"):
        tables = {kind: Table(**entry[kind]) for kind in ("interactions", "items") if kind in entry}
        yield Source(**facts | entry | tables)


SOURCES = tuple(source for file in FILES for source in _load(file))


def find(location: str, table: TableConfig) -> RawData:
    """The raw files at a folder, file or URI, by the first layout that fits, or as a table.

    Raises:
        ConfigError: there is nothing, nothing of a known layout, or files of several kinds.
        DataError: RecBole's files without a column of titles.
    """
    for raw in _readings(location, table):
        if raw:
            return raw
    layouts = ", ".join(f"{source.name} ({', '.join(source.patterns())})" for source in SOURCES)
    raise ConfigError(
        f"{location} holds no raw data; known layouts: {layouts}, RecBole (*.inter, *.item), or"
        " tables (.csv, .tsv, .parquet, .json, .jsonl) whose columns data.table names"
    )


def _readings(location: str, table: TableConfig) -> Iterator[RawData | None]:
    if table == TableConfig():
        yield from (_known(location, source) for source in SOURCES)
        yield _recbole(location)
    yield _any_table(location, table)


def _known(location: str, source: Source) -> RawData | None:
    found = [find_files(location, pattern) for pattern in source.patterns()]
    if not all(found) or (source.marker and not find_files(location, source.marker)):
        return None
    return RawData(source, found[0], found[1] if source.items else [])


def _recbole(location: str) -> RawData | None:
    """Tab-separated files whose header says `name:type`; MovieLens' are known by their name."""
    interactions, items = find_files(location, "*.inter"), find_files(location, "*.item")
    if not interactions or not items:
        return None
    columns = {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
    table = Table(files="*.inter", separator="\t", columns=columns)
    if RATING in columns_of(interactions[0], table):
        table = replace(table, columns=columns | {"rating": RATING})
    found = columns_of(items[0], table)
    title = next((name for name in TITLES if name in found), None)
    if title is None:
        raise DataError(f"{items[0].name} has none of the title columns {', '.join(TITLES)}")
    films = interactions[0].name.startswith("ml-")
    source = Source(
        name="RecBole",
        interactions=replace(table, max_rating=5.0) if films else table,
        items=replace(table, files="*.item", columns={"item": "item_id:token", "title": title}),
        domain="movie" if films else "item",
        family="movielens" if films else "",
    )
    return RawData(source, interactions, items)


def _any_table(location: str, config: TableConfig) -> RawData | None:
    """One file or a folder of shards; the titles in a table of their own or beside them."""
    items = _item_files(location, config)
    taken = {file.path for file in items}
    files = [file for file in _tables(location) if file.path not in taken]
    if not files:
        return None
    columns = {"user": config.user, "item": config.item, "time": config.time}
    columns |= {r: c for r, c in (("rating", config.rating), ("split", config.split)) if c}
    texts = {"title": config.title}
    texts |= {f"{TEXT} {i}": column for i, column in enumerate(config.text)}
    source = Source(
        name="table",
        interactions=_table(files, columns if items else columns | texts, config),
        items=_table(items, {"item": config.item} | texts, config) if items else None,
        domain=config.domain,
    )
    return RawData(source, files, items)


def _item_files(location: str, config: TableConfig) -> list[File]:
    if not config.items:
        return []
    for place in (f"{location.rstrip('/')}/{config.items}", config.items):
        if files := _tables(place):
            return files
    raise ConfigError(f"data.table.items is {config.items}, but there is no such file or folder")


def _tables(location: str) -> list[File]:
    """All files of a known kind that are not hidden."""
    names = [(file, PurePosixPath(file.name).name) for file in find_files(location, "**")]
    return [f for f, name in names if f.suffix in SEPARATORS and name[0] not in "._"]


def _table(files: list[File], columns: dict[str, str], config: TableConfig) -> Table:
    kinds = sorted({file.suffix.removeprefix(".") for file in files})
    if len(kinds) > 1:
        raise ConfigError(
            f"{files[0].name} and its neighbours are of several kinds ({', '.join(kinds)}); name"
            " one file, or move the others away"
        )
    return Table(
        files=files[0].name,
        columns=columns,
        separator=SEPARATORS[files[0].suffix],
        quoting=True,
        encoding=config.encoding,
        time_unit=config.time_unit,
    )
