"""Raw layouts: which files a source has, and what their columns mean. One small file each.

A new source is a file with a `Source` like those beside this one, and its name in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable

from rsllm.config import TableConfig
from rsllm.data.sources import any_table, lastfm, llara, movielens, recbole, steam, synthetic
from rsllm.data.sources.base import RawData, Source
from rsllm.errors import ConfigError

SOURCES: tuple[Source, ...] = (
    *movielens.SOURCES,
    *llara.SOURCES,
    *lastfm.SOURCES,
    steam.SOURCE,
    synthetic.SOURCE,
)

LAYOUTS: dict[str, Callable[[str], RawData | None]] = {
    **{f"{source.name} ({', '.join(source.patterns())})": source.at for source in SOURCES},
    "RecBole (*.inter, *.item)": recbole.at,
}
"""The first one whose files are all there is taken."""

__all__ = ["LAYOUTS", "SOURCES", "RawData", "Source", "find"]


def find(location: str, table: TableConfig) -> RawData:
    """The raw files at a folder, file or URI, by the first layout that fits, or as a table.

    Raises:
        ConfigError: there is nothing, or nothing of a known layout.
    """
    if table == TableConfig():
        for at in LAYOUTS.values():
            raw = at(location)
            if raw is not None:
                return raw
    raw = any_table.at(location, table)
    if raw is None:
        raise ConfigError(
            f"{location} holds no raw data; known layouts: {', '.join(LAYOUTS)}, or tables"
            " (.csv, .tsv, .parquet, .json, .jsonl) whose columns data.table names"
        )
    return raw
