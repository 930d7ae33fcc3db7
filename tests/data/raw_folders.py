"""Writers of small raw folders, in several layouts, and a plain reader of any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsllm.config import TableConfig
from rsllm.data import raw, sources
from rsllm.data.files import Reject
from rsllm.data.raw import RawItems
from rsllm.data.tables import chunks_of

PLAIN = TableConfig()

INTER_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"


def write_grouplens(folder: Path, interactions: list[str], items: dict[str, str]) -> Path:
    """Write `u.data` (tab-separated lines as given) and `u.item` (latin-1)."""
    rows = [f"{item}|{title}" + "|" * 22 for item, title in items.items()]
    write_lines(folder / "u.data", interactions)
    write_lines(folder / "u.item", rows, "latin-1")
    return folder


def write_recbole(folder: Path, interactions: list[str], items: dict[str, str]) -> Path:
    """Write the same as RecBole's atomic files (UTF-8, with headers)."""
    rows = [f"{item}\t{title}\t1995\tDrama" for item, title in items.items()]
    write_lines(folder / "ml-100k.inter", [INTER_HEADER, *interactions])
    write_lines(folder / "ml-100k.item", [ITEM_HEADER, *rows])
    return folder


def write_dat(folder: Path, interactions: list[str], items: dict[str, str]) -> Path:
    """Write the same as MovieLens-10M does."""
    rows = [f"{item}::{title}::Drama|Comedy" for item, title in items.items()]
    write_lines(folder / "ratings.dat", [line.replace("\t", "::") for line in interactions])
    write_lines(folder / "movies.dat", rows)
    return folder


def write_csv(folder: Path, interactions: list[str], items: dict[str, str]) -> Path:
    """Write the same as MovieLens-20M and later editions do."""
    rows = [f'{item},"{title}",Drama|Comedy' for item, title in items.items()]
    lines = [line.replace("\t", ",") for line in interactions]
    write_lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *lines])
    write_lines(folder / "movies.csv", ["movieId,title,genres", *rows])
    return folder


def write_parquet(folder: Path, interactions: list[str], items: dict[str, str]) -> Path:
    """Write a table of one file with typed columns and the titles beside the interactions."""
    rows = [line.split("\t") for line in interactions]
    columns = {
        "user_id": pa.array([int(row[0]) for row in rows]),
        "item_id": pa.array([int(row[1]) for row in rows]),
        "rating": pa.array([float(row[2]) for row in rows]),
        "timestamp": pa.array([int(row[3]) for row in rows], pa.timestamp("s")),
        "title": pa.array([items[row[1]] for row in rows]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "watched.parquet")
    return folder


def write_lines(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    """Write lines that end in a newline each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


def read(
    location: Path | str, config: TableConfig = PLAIN
) -> tuple[RawItems, list[Any], list[Reject]]:
    """Items, interactions (user, item id, rating, seconds) and rejects of a location."""
    data = sources.find(str(location), config)
    chunks = chunks_of(data.interactions, data.layout.interactions)
    if data.layout.items:
        items = raw.read_items(data.items, data.layout.items)
    else:
        found = [raw.titles_beside(chunk, data.layout.interactions) for chunk in chunks]
        items = raw.settle_titles(sum(found[1:], found[0]), data.layout.interactions)
    rows: list[Any] = []
    rejects = list(items.rejects)
    first: dict[str, int] = {}
    for chunk in chunks:
        lines = 0
        ids = pa.array(items.ids)
        for part in raw.read_interactions(chunk, data.layout.interactions, ids):
            rows += part.table.to_pylist()
            start = first.get(chunk.file.name, 0) + 1
            name = chunk.file.name
            rejects += [Reject(name, start + line, *part.broken[line]) for line in part.broken]
            lines += part.num_lines
        first[chunk.file.name] = first.get(chunk.file.name, 0) + lines
    plain = [
        (row["user"], items.ids[row["item"]], row.get("rating"), row["time"] / 1000) for row in rows
    ]
    return items, plain, rejects
