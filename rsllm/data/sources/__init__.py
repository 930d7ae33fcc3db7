"""Raw layouts: which files a source has, and what their columns mean.

A known one is a TOML file like those beside this one; a user's own may lie anywhere. RecBole's
atomic files (https://recbole.io/docs/user_guide/data/atomic_files.html) and other tables say more
of themselves and are read here.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path, PurePosixPath
from typing import Any

from rsllm.config import AUTO, DataConfig, Domain, TableConfig
from rsllm.config.data import TABS, Split
from rsllm.config.plain import from_dict, to_dict
from rsllm.data.delimited import fields
from rsllm.data.dialect import provisional, settle
from rsllm.data.files import RawFile, TableFormat, find_files
from rsllm.data.raw import TEXT, setting
from rsllm.data.tables import check, columns_of, head
from rsllm.errors import ConfigError
from rsllm.store.artifacts import MANIFEST

FILES = ("movielens", "llara", "lastfm", "steam", "synthetic")
SUFFIXES = {".csv", ".tsv", ".tab", ".parquet", ".json", ".jsonl", ".ndjson"}
ROLES: Mapping[str, Sequence[str]] = tomllib.loads(
    Path(__file__).with_name("roles.toml").read_text()
)
OWN = (
    *("user", "item", "time", "rating", "title", "text", "split", "items", "item_id", "header"),
    *("missing", "fold_ids", "domain"),
)
"""Settings of tables that known layouts say themselves."""
READING = ("separator", "quote", "escape", "encoding", "time_unit")


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
        split: how it is split unless the user says so.
    """

    name: str
    interactions: TableFormat
    items: TableFormat | None = None
    domain: Domain = "item"
    family: str = ""
    marker: str = ""
    timed: bool = True
    split: Split = "leave-one-out"

    def patterns(self) -> list[str]:
        """The files it needs."""
        return [table.files for table in (self.interactions, self.items) if table]


@dataclass(frozen=True)
class RawData:
    """A source and its files.

    Attributes:
        source: with nothing left to find in the files.
        interactions: files of them.
        items: files of the titles, if these do not stand beside the interactions.
        found: what was found by looking, as the settings that would say it, by file.
        known: whether it is a layout of ours, read as it says.
    """

    source: Source
    interactions: Sequence[RawFile]
    items: Sequence[RawFile]
    found: Mapping[str, str]
    known: bool = False

    def named(self, config: DataConfig) -> dict[str, Any]:
        """The settings as plain data, with all that decides what is read in place of the table."""
        plain, reading = to_dict(config), to_dict(self.source)
        for kind in ("interactions", "items"):
            (reading[kind] or {}).pop("remedy", None)
        del plain["layout"]
        return plain | {"table": reading}


def load(path: Path, **usual: Any) -> Iterator[Source]:
    """The layouts that a TOML file describes; `usual` holds for tables that do not say it.

    Raises:
        ConfigError: it cannot be read, or says something else than `Source` and `TableFormat` have.
    """
    try:
        facts = tomllib.loads(path.read_text("utf-8"))
        entries = facts.pop("source")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"layout {path} cannot be read ({error}); see README.md") from None
    for entry in entries if isinstance(entries, list) else [entries]:
        whole = facts | entry
        tables = [k for k in ("interactions", "items") if isinstance(whole.get(k), dict)]
        usual["strip_years"] = whole.get("domain") == "movie"
        whole |= {kind: usual | whole[kind] for kind in tables}
        for told, kind in ((whole, Source), *((whole[name], TableFormat) for name in tables)):
            known = [field.name for field in fields_of(kind)]
            if unknown := [name for name in told if name not in known]:
                raise ConfigError(
                    f"layout {path} says {unknown[0]!r}; known are {', '.join(known)}"
                )
        yield from_dict(Source, whole)


SOURCES = tuple(
    source for file in FILES for source in load(Path(__file__).with_name(f"{file}.toml"))
)


def find(location: str, config: TableConfig, layout: str = "") -> RawData:
    """The raw files at a folder, file or URI, by the first layout that fits, or as a table.

    Only the beginnings of files are read until their columns are known to be there.

    Raises:
        ConfigError: there is nothing, nothing of a known layout, files of several kinds, or no
            column where one is needed.
    """
    refused: list[str] = []
    said = [name for name in OWN if getattr(config, name) != getattr(_UNSAID, name)]
    own = tuple(load(Path(layout).expanduser(), **_USUAL)) if layout else ()
    if own and said:
        raise ConfigError(f"data.table.{said[0]} is for the layout {layout} to say; say it there")
    for source in () if said else own or SOURCES:
        if raw := _known(location, source, config, refused):
            return replace(raw, known=not own and config == _UNSAID)
    if not own and (raw := _recbole(location, config) or _any_table(location, config)):
        return raw
    layouts = ", ".join(f"{s.name} ({', '.join(s.patterns())})" for s in own or SOURCES)
    looks = f"{'; '.join(refused)}. It" if refused else location
    others = ", RecBole (*.inter, *.item), or tables (.csv, .tsv, .parquet, .json, .jsonl)"
    raise ConfigError(f"{looks} holds no raw data; known layouts: {layouts}{'' if own else others}")


_UNSAID = TableConfig()
_USUAL: dict[str, Any] = {"missing": _UNSAID.missing, "fold_ids": _UNSAID.fold_ids}


def _known(
    location: str, source: Source, config: TableConfig, refused: list[str]
) -> RawData | None:
    """The files of a layout; `refused` takes what tells that they only bear its names."""
    found = [find_files(location, pattern) for pattern in source.patterns()]
    if not all(found) or (source.marker and not find_files(location, source.marker)):
        return None
    tables = [table for table in (source.interactions, source.items) if table]
    for table, (file, *_) in zip(tables, found, strict=True):
        look = provisional(table, file)
        names = columns_of(file, look)
        missing = [f"no column {name!r}" for name in look.columns.values() if name not in names]
        lines = head(file, look.encoding, 100) if table.header else []
        if lines and not any(len(fields(line, look) or ()) == len(names) for line in lines):
            missing.append(f"no line of {len(names)} columns at its beginning")
        if missing and (names or lines):
            refused.append(f"{file.name} looks like {source.name}, but has {missing[0]}")
            return None
    return _settled(source, found[0], found[1] if source.items else [], config)


def _settled(
    source: Source, interactions: list[RawFile], items: list[RawFile], config: TableConfig
) -> RawData:
    """The source with what its files and the user's settings say."""
    found: dict[str, str] = {}
    for kind, files in (("items", items), ("interactions", interactions)):
        if files:
            table = replace(getattr(source, kind), **told_of(config))
            check(files, provisional(table, files[0]))
            settled, seen = settle(table, files)
            changed: dict[str, Any] = {kind: settled}
            source = replace(source, **changed)
            found[files[0].name] = " ".join(_said(name, value) for name, value in seen.items())
    return RawData(source, interactions, items, {f: said for f, said in found.items() if said})


def _said(name: str, value: str) -> str:
    """A setting as the command line says it, with what was noted about it."""
    value, space, note = value.partition(" (") if name == "encoding" else (value, "", "")
    value = TABS[0] if value == "\t" else value or "none"
    return f"{setting(name, value)}{space}{note}"


def told_of(config: TableConfig) -> dict[str, Any]:
    """The user's settings, as fields of `TableFormat`."""
    told = {n: getattr(config, n) for n in READING if getattr(config, n) != AUTO}
    told |= {n: "" for n in ("quote", "escape") if told.get(n) == "none"}
    told |= {"separator": "\t"} if told.get("separator") in TABS else {}
    if config.years != AUTO:
        told["strip_years"] = config.years == "strip"
    changed = [
        n for n in ("move_articles", "unescape") if getattr(config, n) != getattr(_UNSAID, n)
    ]
    return told | {name: getattr(config, name) for name in changed}


def _recbole(location: str, config: TableConfig) -> RawData | None:
    """Tab-separated files whose header says `name:type`; MovieLens' are known by their name."""
    interactions, items = find_files(location, "*.inter"), find_files(location, "*.item")
    if not interactions or not items:
        return None
    films = interactions[0].name.startswith("ml-")
    like = replace(config, quote="none") if config.quote == AUTO else config
    if films and config.time_unit == AUTO:
        like = replace(like, time_unit="seconds")
    if not config.rating:
        rated = [n for n in _columns(interactions[0], config) if _plain(n) == "rating"]
        like = replace(like, rating=rated[0] if rated else "")
    raw = _table_data(interactions, items, like, "movie" if films else config.domain)
    table, family = raw.source.interactions, "movielens" if films else ""
    source = replace(
        raw.source,
        name="RecBole",
        family=family,
        interactions=replace(table, max_rating=5.0) if films else table,
        split="user" if films else raw.source.split,
    )
    return replace(raw, source=source, known=films and config == _UNSAID)


def _any_table(location: str, config: TableConfig) -> RawData | None:
    """One file or a folder of shards; the titles in a table of their own or beside them."""
    files, items = _tables(location), _item_files(location, config)
    taken = {file.path for file in items}
    files = [file for file in files if file.path not in taken]
    if not files:
        return None
    if not items and len(files) > 1:
        names = {file.path: _columns(file, config) for file in files}
        user = "" if config.user == AUTO else config.user
        told = [f for f in files if (user or _role("user", names[f.path])) in names[f.path]]
        others = [f for f in files if f not in told and _role("title", names[f.path])]
        if told:
            files, items = [file for file in files if file not in others], others
    _one_kind(files)
    _one_kind(items)
    return _table_data(files, items, config, config.domain)


def _table_data(
    files: list[RawFile], items: list[RawFile], config: TableConfig, domain: Domain
) -> RawData:
    """Tables whose columns bear the names that the settings say, or usual ones."""
    names = _columns(files[0], config)
    columns = {role: _named(role, names, files[0], config) for role in ("user", "item", "time")}
    columns |= {r: getattr(config, r) for r in ("rating", "split") if getattr(config, r)}
    texts = {f"{TEXT} {i}": column for i, column in enumerate(config.text)}
    item_columns: dict[str, str] = {}
    if items:
        held = _columns(items[0], replace(config, header=()))
        same = columns["item"] in held and config.item_id == AUTO
        item = columns["item"] if same else _named("item_id", held, items[0], config)
        title = _named("title", held, items[0], config)
        item_columns = {"item": item, "title": title} | texts
    else:
        columns |= {"title": _named("title", names, files[0], config)} | texts
    strip = config.years == "strip" or (config.years == AUTO and domain == "movie")
    table = TableFormat(
        files=files[0].name,
        columns=columns,
        header=config.header,
        missing=config.missing,
        fold_ids=config.fold_ids,
        strip_years=strip,
    )
    of_items = replace(table, columns=item_columns, header=()) if items else None
    source = Source(
        name="table",
        interactions=table,
        items=of_items and replace(of_items, files=items[0].name),
        domain=domain,
        split="given" if config.split else "leave-one-out",
    )
    raw = _settled(source, files, items, config)
    in_items = {"item_id" if role == "item" else role: c for role, c in item_columns.items()}
    found = dict[str, str]()
    for file, roles in zip((files[0], *items[:1]), (columns, in_items), strict=False):
        new = [setting(r, c) for r, c in roles.items() if getattr(config, r, c) == AUTO]
        found[file.name] = " ".join([*new, raw.found.get(file.name, "")]).strip()
    if not config.rating and (rating := _role("rating", names)):
        found[files[0].name] += f" ({rating} is not used; {setting('rating', rating)} would)"
    return replace(raw, found={f: said.strip() for f, said in found.items() if said})


def _columns(file: RawFile, config: TableConfig) -> tuple[str, ...]:
    table = TableFormat(files=file.name, columns={}, **told_of(config))
    return columns_of(file, replace(provisional(table, file), header=config.header))


def _plain(column: str) -> str:
    """Without case, punctuation and RecBole's type."""
    return re.sub(r"[\W_]", "", column.partition(":")[0].casefold())


def _role(role: str, columns: Sequence[str]) -> str:
    """The column with the likeliest of a role's usual names, or none."""
    usual = [*ROLES[role], *(ROLES["item"] if role == "item_id" else ())]
    by_name = {_plain(column): column for column in reversed(columns)}
    return next((by_name[_plain(name)] for name in usual if _plain(name) in by_name), "")


def _named(role: str, columns: Sequence[str], file: RawFile, config: TableConfig) -> str:
    """The column that a role has by the settings, or by a usual name.

    Raises:
        ConfigError: there is none; the message ends in the setting that names it.
    """
    told, usual = getattr(config, role), _role(role, columns)
    if told != AUTO:
        if told in columns or not columns:
            return str(told)
        short = [column for column in columns if column.partition(":")[0] == told]
        if short:
            return short[0]
    elif usual:
        return usual
    what = f"no column {told!r}" if told != AUTO else f"none of the usual columns of a {role}"
    held = f"it has {', '.join(columns)}" if columns else "it is empty"
    way = setting(role, usual or "COLUMN")
    if role == "title" and told == AUTO:
        way += f", or the table that has them: {setting('items', 'FILE')}"
    raise ConfigError(f"{file.name} has {what}; {held}. Say which: {way}")


def _item_files(location: str, config: TableConfig) -> list[RawFile]:
    if not config.items:
        return []
    here = location.rstrip("/")
    beside = [here] if "::" in here else [here, here.rpartition("/")[0]]
    for place in (*(f"{folder}/{config.items}" for folder in beside), config.items):
        if files := _tables(place):
            return files
    raise ConfigError(f"data.table.items is {config.items}, but there is no such file or folder")


def _tables(location: str) -> list[RawFile]:
    """All files of a known kind that are not hidden; one that is named may be of any."""
    # An asset in the cache has its manifest beside it.
    files = [file for file in find_files(location, "**") if file.name != MANIFEST]
    names = [(file, PurePosixPath(file.name).name) for file in files]
    alone = len(files) == 1 and location.rstrip("/").endswith(files[0].name)
    return [f for f, n in names if (alone or f.suffix in SUFFIXES) and n[0] not in "._"]


def _one_kind(files: list[RawFile]) -> None:
    kinds = sorted({file.suffix.removeprefix(".") for file in files})
    if len(kinds) > 1:
        raise ConfigError(
            f"{files[0].name} and its neighbours are of several kinds ({', '.join(kinds)}); name"
            " one file, or move the others away"
        )
