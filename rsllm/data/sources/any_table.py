"""Any table: CSV, TSV, JSON lines or Parquet, whose columns `data.table` names."""

from __future__ import annotations

from pathlib import PurePosixPath

from rsllm.config import TableConfig
from rsllm.data.files import File, Table, find_files
from rsllm.data.raw import TEXT
from rsllm.data.sources.base import RawData, Source
from rsllm.errors import ConfigError

_SEPARATORS = {"csv": ",", "tsv": "\t"}
_KINDS = {*_SEPARATORS, "parquet", "json", "jsonl"}


def at(location: str, config: TableConfig) -> RawData | None:
    """One file or a folder of shards; the titles in a table of their own or beside them.

    Raises:
        ConfigError: files of several kinds, or an item table that is not there.
    """
    items = _item_files(location, config)
    taken = {file.path for file in items}
    files = [f for f in find_files(location, "**") if _kind(f) and f.path not in taken]
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
    for place in (config.items, f"{location.rstrip('/')}/{config.items}"):
        files = [file for file in find_files(place, "**") if _kind(file)]
        if files:
            return files
    raise ConfigError(f"data.table.items is {config.items}, but there is no such file or folder")


def _kind(file: File) -> str | None:
    """The suffix that tells the format, compression aside; none for hidden files."""
    if PurePosixPath(file.name).name.startswith((".", "_")):
        return None
    suffixes = [part.removeprefix(".") for part in PurePosixPath(file.name).suffixes[-2:]]
    return next((suffix for suffix in suffixes if suffix in _KINDS), None)


def _table(files: list[File], columns: dict[str, str], config: TableConfig) -> Table:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"{files[0].name} and its neighbours are of several kinds"
            f" ({', '.join(sorted(map(str, kinds)))}); name one file, or move the others away"
        )
    return Table(
        files=files[0].name,
        columns=columns,
        separator=_SEPARATORS.get(kinds.pop() or "", ""),
        quoting=True,
        encoding=config.encoding,
        time_unit=config.time_unit,
    )
