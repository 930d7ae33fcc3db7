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
from rsllm.config.data import TABS, SplitRule, table_flag
from rsllm.config.plain import from_dict, to_dict
from rsllm.data.delimited import fields
from rsllm.data.dialect import first_look, settle
from rsllm.data.files import RawFile, TableFormat, find_files, head
from rsllm.data.raw import TEXT
from rsllm.data.tables import check, columns_of
from rsllm.errors import ConfigError
from rsllm.store.artifacts import MANIFEST

FILES = ("movielens", "llara", "lastfm", "steam", "synthetic")
SUFFIXES = {".csv", ".tsv", ".tab", ".parquet", ".json", ".jsonl", ".ndjson"}
ROLES: Mapping[str, Sequence[str]] = tomllib.loads(
    Path(__file__).with_name("roles.toml").read_text()
)
READING = ("separator", "quote", "escape", "encoding", "time_unit")
OF_TITLES = ("years", "move_articles", "unescape")
"""Settings of tables that known layouts obey, beside those of reading; the others they say."""


@dataclass(frozen=True)
class RawLayout:
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
    split: SplitRule = "leave-one-out"

    def patterns(self) -> list[str]:
        """Return the files it needs."""
        return [table.files for table in (self.interactions, self.items) if table]


@dataclass(frozen=True)
class RawData:
    """A source and its files.

    Attributes:
        layout: with nothing left to find in the files.
        interactions: files of them.
        items: files of the titles, if these do not stand beside the interactions.
        found: what was found by looking, as the settings that would say it, by file.
        known: whether it is a layout of ours, read as it says.
    """

    layout: RawLayout
    interactions: Sequence[RawFile]
    items: Sequence[RawFile]
    found: Mapping[str, str]
    known: bool = False

    def key_of(self, config: DataConfig) -> dict[str, Any]:
        """The settings as plain data, with all that decides what is read in place of the table."""
        plain, reading = to_dict(config), to_dict(self.layout)
        for kind in ("interactions", "items"):
            (reading[kind] or {}).pop("remedy", None)
        del plain["layout"]
        return plain | {"table": reading}


def load_layouts(path: Path, **usual: Any) -> Iterator[RawLayout]:
    """Yield the layouts that a TOML file describes; `usual` holds for tables that do not say it.

    Raises:
        ConfigError: it cannot be read, or says something else than `RawLayout` has.
    """
    try:
        facts = tomllib.loads(path.read_text("utf-8"))
        layouts = facts.pop("source")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"layout {path} cannot be read ({error}); see README.md") from None
    for layout in layouts if isinstance(layouts, list) else [layouts]:
        whole = facts | layout
        tables = [k for k in ("interactions", "items") if isinstance(whole.get(k), dict)]
        usual["strip_years"] = whole.get("domain") == "movie"
        whole |= {kind: usual | whole[kind] for kind in tables}
        for entries, kind in ((whole, RawLayout), *((whole[name], TableFormat) for name in tables)):
            known = [field.name for field in fields_of(kind)]
            if unknown := [name for name in entries if name not in known]:
                raise ConfigError(
                    f"layout {path} says {unknown[0]!r}; known are {', '.join(known)}"
                )
        yield from_dict(RawLayout, whole)


LAYOUTS = tuple(
    layout for file in FILES for layout in load_layouts(Path(__file__).with_name(f"{file}.toml"))
)
DEFAULTS = TableConfig()


def find(location: str, config: TableConfig, layout: str = "") -> RawData:
    """Return the raw files at a folder, file or URI, by the first layout that fits, or as a table.

    Only the beginnings of files are read until their columns are known to be there.

    Raises:
        ConfigError: there is nothing, nothing of a known layout, files of several kinds, or no
            column where one is needed.
    """
    ids = {"missing": DEFAULTS.missing, "fold_ids": DEFAULTS.fold_ids}
    own = tuple(load_layouts(Path(layout).expanduser(), **ids)) if layout else ()
    usual = to_dict(DEFAULTS)
    changed = [name for name, value in to_dict(config).items() if value != usual[name]]
    chosen = [name for name in changed if name not in (*READING, *OF_TITLES)]
    if own and chosen:
        raise ConfigError(f"data.table.{chosen[0]} is for the layout {layout} to say; say it there")
    faults = []
    for known in () if chosen else own or LAYOUTS:
        found = [find_files(location, pattern) for pattern in known.patterns()]
        if not all(found) or (known.marker and not find_files(location, known.marker)):
            continue
        if fault := _fault(known, [files[0] for files in found]):
            faults.append(fault)
        else:
            raw = _settled(known, found[0], found[1] if known.items else [], config)
            return replace(raw, known=not own and config == DEFAULTS)
    if not own and (table := _recbole(location, config) or _any_table(location, config)):
        return table
    layouts = ", ".join(f"{s.name} ({', '.join(s.patterns())})" for s in own or LAYOUTS)
    looks = f"{'; '.join(faults)}. It" if faults else location
    others = ", RecBole (*.inter, *.item), or tables (.csv, .tsv, .parquet, .json, .jsonl)"
    raise ConfigError(f"{looks} holds no raw data; known layouts: {layouts}{'' if own else others}")


def _fault(layout: RawLayout, firsts: Sequence[RawFile]) -> str:
    """Return the proof that the files of a layout only bear its names; empty if there is none."""
    tables = [table for table in (layout.interactions, layout.items) if table]
    for table, file in zip(tables, firsts, strict=True):
        look = first_look(table, file)
        names = columns_of(file, look)
        missing = [f"no column {name!r}" for name in look.columns.values() if name not in names]
        lines = head(file, look.encoding, 100) if table.header else []
        if lines and not any(len(fields(line, look) or ()) == len(names) for line in lines):
            missing.append(f"no line of {len(names)} columns at its beginning")
        if missing and (names or lines):
            return f"{file.name} looks like {layout.name}, but has {missing[0]}"
    return ""


def _settled(
    layout: RawLayout, interactions: list[RawFile], items: list[RawFile], config: TableConfig
) -> RawData:
    """Return the layout with what its files and the user's settings say."""
    found: dict[str, str] = {}
    for kind, files in (("items", items), ("interactions", interactions)):
        if files:
            table = replace(getattr(layout, kind), **_settings_of(config))
            check(files, first_look(table, files[0]))
            settled, seen = settle(table, files)
            changed: dict[str, Any] = {kind: settled}
            layout = replace(layout, **changed)
            if seen:
                found[files[0].name] = " ".join(_flag(name, value) for name, value in seen.items())
    return RawData(layout, interactions, items, found)


def _flag(name: str, value: str) -> str:
    """Return a setting as the command line says it, with what was noted about it."""
    value, space, note = value.partition(" (") if name == "encoding" else (value, "", "")
    value = TABS[0] if value == "\t" else value or "none"
    return f"{table_flag(name, value)}{space}{note}"


def _settings_of(config: TableConfig) -> dict[str, Any]:
    """Return the user's settings, as fields of `TableFormat`."""
    chosen = {n: getattr(config, n) for n in READING if getattr(config, n) != AUTO}
    chosen |= {n: "" for n in ("quote", "escape") if chosen.get(n) == "none"}
    if chosen.get("separator") in TABS:
        chosen["separator"] = "\t"
    if config.years != AUTO:
        chosen["strip_years"] = config.years == "strip"
    for name in ("move_articles", "unescape"):
        if getattr(config, name) != getattr(DEFAULTS, name):
            chosen[name] = getattr(config, name)
    return chosen


def _recbole(location: str, config: TableConfig) -> RawData | None:
    """Tab-separated files whose header says `name:type`; MovieLens' are known by their name."""
    interactions, items = find_files(location, "*.inter"), find_files(location, "*.item")
    if not interactions or not items:
        return None
    films = interactions[0].name.startswith("ml-")
    usual: dict[str, Any] = {"quote": "none"} if config.quote == AUTO else {}
    if films and config.time_unit == AUTO:
        usual["time_unit"] = "seconds"
    if not config.rating:
        columns = _columns(interactions[0], config)
        usual["rating"] = next((name for name in columns if _plain(name) == "rating"), "")
    domain = "movie" if films else config.domain
    raw = _table_data(interactions, items, replace(config, **usual), domain)
    layout = replace(raw.layout, name="RecBole")
    if films:
        rated = replace(layout.interactions, max_rating=5.0)
        layout = replace(layout, family="movielens", split="user", interactions=rated)
    return replace(raw, layout=layout, known=films and config == DEFAULTS)


def _any_table(location: str, config: TableConfig) -> RawData | None:
    """One file or a folder of shards; the titles in a table of their own or beside them."""
    items = _item_files(location, config)
    files = [file for file in _tables(location) if file.path not in {i.path for i in items}]
    if not files:
        return None
    if not items and len(files) > 1:
        names = {file.path: _columns(file, config) for file in files}
        user = "" if config.user == AUTO else config.user
        logs = [f for f in files if (user or _role("user", names[f.path])) in names[f.path]]
        others = [f for f in files if f not in logs and _role("title", names[f.path])]
        if logs:
            files, items = [file for file in files if file not in others], others
    for table in (files, items):
        kinds = sorted({file.suffix.removeprefix(".") for file in table})
        if len(kinds) > 1:
            raise ConfigError(
                f"{table[0].name} and its neighbours are of several kinds ({', '.join(kinds)});"
                " name one file, or move the others away"
            )
    return _table_data(files, items, config, config.domain)


def _table_data(
    files: list[RawFile], items: list[RawFile], config: TableConfig, domain: Domain
) -> RawData:
    """Return tables whose columns bear the names that the settings say, or usual ones."""
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
    table = TableFormat(
        files=files[0].name,
        columns=columns,
        header=config.header,
        missing=config.missing,
        fold_ids=config.fold_ids,
        strip_years=domain == "movie",
    )
    titles = replace(table, files=items[0].name, columns=item_columns, header=()) if items else None
    split: SplitRule = "given" if config.split else "leave-one-out"
    layout = RawLayout("table", table, titles, domain=domain, split=split)
    raw = _settled(layout, files, items, config)
    in_items = {"item_id" if role == "item" else role: c for role, c in item_columns.items()}
    found = dict[str, str]()
    for file, roles in zip((files[0], *items[:1]), (columns, in_items), strict=False):
        new = [table_flag(r, c) for r, c in roles.items() if getattr(config, r, c) == AUTO]
        found[file.name] = " ".join([*new, raw.found.get(file.name, "")]).strip()
    if not config.rating and (rating := _role("rating", names)):
        found[files[0].name] += f" ({rating} is not used; {table_flag('rating', rating)} would)"
    return replace(raw, found={f: said.strip() for f, said in found.items() if said})


def _columns(file: RawFile, config: TableConfig) -> tuple[str, ...]:
    table = TableFormat(files=file.name, columns={}, **_settings_of(config))
    return columns_of(file, replace(first_look(table, file), header=config.header))


def _plain(column: str) -> str:
    """Return the column's name without case, punctuation and RecBole's type."""
    return re.sub(r"[\W_]", "", column.partition(":")[0].casefold())


def _role(role: str, columns: Sequence[str]) -> str:
    """Return the column with the likeliest of a role's usual names, or none."""
    usual = [*ROLES[role], *(ROLES["item"] if role == "item_id" else ())]
    by_name = {_plain(column): column for column in reversed(columns)}
    return next((by_name[_plain(name)] for name in usual if _plain(name) in by_name), "")


def _named(role: str, columns: Sequence[str], file: RawFile, config: TableConfig) -> str:
    """Return the column that a role has by the settings, or by a usual name.

    Raises:
        ConfigError: there is none; the message ends in the setting that names it.
    """
    chosen, usual = getattr(config, role), _role(role, columns)
    if chosen != AUTO:
        if chosen in columns or not columns:
            return str(chosen)
        short = [column for column in columns if column.partition(":")[0] == chosen]
        if short:
            return short[0]
    elif usual:
        return usual
    what = f"no column {chosen!r}" if chosen != AUTO else f"none of the usual columns of a {role}"
    held = f"it has {', '.join(columns)}" if columns else "it is empty"
    way = table_flag(role, usual or "COLUMN")
    if role == "title" and chosen == AUTO:
        way += f", or the table that has them: {table_flag('items', 'FILE')}"
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
    """Return all files of a known kind that are not hidden; one that is named may be of any."""
    # An asset in the cache has its manifest beside it.
    files = [file for file in find_files(location, "**") if file.name != MANIFEST]
    names = [(file, PurePosixPath(file.name).name) for file in files]
    alone = len(files) == 1 and location.rstrip("/").endswith(files[0].name)
    return [f for f, n in names if (alone or f.suffix in SUFFIXES) and n[0] not in "._"]
