"""The prepared folder: Parquet tables, written by `rsllm.data.prepare` and read here.

items.parquet, users.parquet         source ids, titles, training interactions
events/part-*.parquet                every kept interaction
train/part-*.parquet                 rows: a history and the item that came next
validation.parquet, test.parquet     held-out rows
candidates/SPLIT-DRAW.parquet        candidate sets, row by row as in the split's file
pools/part-*.parquet                 what training negatives are drawn from, row by row as in train,
                                     where they are not drawn from the whole catalogue
counts.json, rejects.jsonl           what became of every raw line

Times are milliseconds since 1970.
"""

# Axes: R rows, H history, C candidates, I items.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rsllm.config import Domain
from rsllm.data.sequences import NO_ITEM, Catalogue, Events, Ints, Rows, Split
from rsllm.errors import DataError, require
from rsllm.store.artifacts import manifest, read_json

COUNTS = "counts.json"
ITEMS = "items.parquet"
USERS = "users.parquet"

_INT, _LONG, _TEXT, _LIST = pa.int32(), pa.int64(), pa.string(), pa.list_(pa.int32())
_SCHEMAS = {
    "items": pa.schema(
        {"item": _INT, "source_id": _TEXT, "title": _TEXT}
        | {"title_key": _INT, "representative": pa.bool_(), "count": _LONG}
    ),
    "users": pa.schema({"user": _INT, "source_id": _TEXT}),
    "events": pa.schema({"user": _INT, "item": _INT, "time": _LONG}),
    "rows": pa.schema(
        {"user": _INT, "position": _INT, "history": _LIST, "target": _INT, "time": _LONG}
    ),
    "candidates": pa.schema({"user": _INT, "position": _INT, "candidates": _LIST}),
}


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set.

    Attributes:
        path: its folder.
        titles: the title of each item.
        source_ids: the id that the raw data has for each item.
        catalogue: which items bear equal titles, and how often they train.
        facts: the manifest, and under "counts" what became of all rows.
    """

    path: Path
    titles: list[str]
    source_ids: list[str]
    catalogue: Catalogue
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> PreparedData:
        """Open a folder made by `rsllm.data.prepare.prepare`, after checking every file's hash.

        Raises:
            CheckpointError: a file is missing or altered.
            DataError: a file has another schema.
        """
        facts = {**manifest(path, verify=True), "counts": read_json(path / COUNTS)}
        items = read_table(path / ITEMS, "items")
        representatives = np.flatnonzero(items["representative"].to_numpy()).astype(np.int32)
        keys_I, counts_I = items["title_key"].to_numpy(), items["count"].to_numpy()
        catalogue = Catalogue(keys_I, representatives, counts_I)
        titles, source_ids = items["title"].to_pylist(), items["source_id"].to_pylist()
        return cls(path, titles, source_ids, catalogue, facts)

    @property
    def config(self) -> dict[str, Any]:
        """The `DataConfig` it was made with, as plain data."""
        return dict(self.facts["inputs"]["config"])

    @property
    def domain(self) -> Domain:
        """The kind of the items."""
        return cast(Domain, self.facts["counts"]["domain"])

    @property
    def num_draws(self) -> int:
        """Candidate sets of each held-out row."""
        return int(self.config["num_draws"])

    def user_ids(self) -> list[str]:
        """Return the id that the raw data has for each user.

        Raises:
            ConfigError: no user is here.
        """
        self._require_users()
        return list(read_table(self.path / USERS, "users")["source_id"].to_pylist())

    def rows(self, split: Split, draw: int = 0) -> Rows:
        """Return the rows of a split by user and position; only `rows("test")` opens the test file.

        Raises:
            ConfigError: no user is here.
            DataError: a file has another schema, or there is no such draw.
        """
        self._require_users()
        window: int = self.config["window"]
        if split == "train":
            rows = to_rows(_read_parts(self.path / "train", "rows"), window)
            if self.config["candidates"] != "recommender":
                return rows
            drawn = _read_parts(self.path / "pools", "candidates")
            return replace(rows, pool_RP=_sets_of(rows, drawn, "training pools"))
        rows = to_rows(read_table(self.path / f"{split}.parquet", "rows"), window)
        if not 0 <= draw < self.num_draws:
            raise DataError(f"{self.path} has draws 0 to {self.num_draws - 1}, not {draw}")
        drawn = read_table(candidates_file(self.path, split, draw), "candidates")
        return replace(rows, candidates_RC=_sets_of(rows, drawn, f"{split} candidates"))

    def events(self) -> Events:
        """Every kept interaction, those that are held out too, by user and in order.

        Raises:
            ConfigError: no user is here.
        """
        self._require_users()
        table = _read_parts(self.path / "events", "events")
        return Events(*(table[name].to_numpy() for name in ("user", "item", "time")))

    def times_before(self, rows: Rows) -> NDArray[np.int64]:
        """When each row's user met the item before its target, in milliseconds since 1970. [R]

        Raises:
            ConfigError: no user is here.
            DataError: a file is damaged or has another schema.
        """
        self._require_users()
        asked = pa.array(np.unique(rows.user_R))
        table = _read_parts(self.path / "events", "events", pc.field("user").isin(asked))
        start_R = np.searchsorted(table["user"].to_numpy(), rows.user_R)
        return np.asarray(table["time"].to_numpy()[start_R + rows.position_R - 1])

    def _require_users(self) -> None:
        """Refuse what an exported model brings along, which is items alone (`rsllm.export`)."""
        require(
            (self.path / USERS).exists(),
            f"{self.path} came with an exported model, and users stay where it was trained; give"
            " histories of titles, or load the model from the store that trained it",
        )


def candidates_file(folder: Path, split: Split, draw: int) -> Path:
    """Return the file of one draw of a split's candidate sets."""
    return folder / "candidates" / f"{split}-{draw}.parquet"


def write_items(
    path: Path, source_ids: Sequence[str], titles: Sequence[str], catalogue: Catalogue
) -> None:
    """Write the item table."""
    number_I = np.arange(len(titles), dtype=np.int32)
    keys_I, counts_I = catalogue.title_keys_I, catalogue.counts_I
    representative_I = np.isin(number_I, catalogue.representatives)
    columns = [number_I, source_ids, titles, keys_I, representative_I, counts_I]
    write_table(path, "items", columns)


def row_columns(rows: Rows) -> list[Any]:
    """Return the columns of rows, for `to_table`."""
    history = _to_lists(rows.history_RH)
    return [rows.user_R, rows.position_R, history, rows.target_R, rows.time_R]


def write_sets(path: Path, rows: Rows, make: Callable[[Rows], Ints], step: int) -> None:
    """Write the candidate sets that `make` gives so many rows at a time."""
    with table_writer(path, "candidates") as writer:
        for start in range(0, len(rows), step):
            some = rows.take(slice(start, start + step))
            columns = [some.user_R, some.position_R, _to_lists(make(some))]
            writer.write_table(to_table("candidates", columns))


def to_table(kind: str, columns: Sequence[Any]) -> pa.Table:
    """Return columns as a table of one of the folder's schemas."""
    arrays = [c if isinstance(c, pa.Array) else pa.array(c) for c in columns]
    return pa.Table.from_arrays(arrays, schema=_SCHEMAS[kind])


def write_table(path: Path, kind: str, columns: Sequence[Any]) -> None:
    """Write one file of one of the folder's schemas."""
    with table_writer(path, kind) as writer:
        writer.write_table(to_table(kind, columns))


def table_writer(path: Path, kind: str) -> pq.ParquetWriter:
    """Return a writer of a file in several goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return pq.ParquetWriter(path, _SCHEMAS[kind], compression="zstd", write_page_checksum=True)


def read_table(path: Path, kind: str) -> pa.Table:
    """Read a file of one of the folder's schemas, checking its pages.

    Raises:
        DataError: it is damaged or has another schema.
    """
    schema = _SCHEMAS[kind]
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(schema):
                fields = [*schema, *file.schema_arrow]
                names = dict.fromkeys(field.name for field in fields if fields.count(field) == 1)
                raise DataError(
                    f"{path} has another schema (column {', '.join(names)}); prepare the data again"
                )
            return file.read().combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the data again") from error


def _read_parts(folder: Path, kind: str, wanted: pc.Expression | None = None) -> pa.Table:
    """Return all parts, or their wanted lines, by user; a user is in one part, in order."""
    parts = (read_table(part, kind) for part in sorted(folder.glob("part-*.parquet")))
    table = pa.concat_tables(part if wanted is None else part.filter(wanted) for part in parts)
    return table.take(table["user"].to_numpy().argsort(kind="stable")).combine_chunks()


def _sets_of(rows: Rows, drawn: pa.Table, name: str) -> Ints:
    if not np.array_equal(drawn["user"].to_numpy(), rows.user_R):
        raise DataError(f"the {name} are of other rows; prepare the data again")
    return _pad(drawn["candidates"])


def _to_lists(padded_RN: Ints) -> pa.ListArray:
    filled_RN = padded_RN != NO_ITEM
    offsets = np.concatenate([[0], np.cumsum(filled_RN.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, padded_RN[filled_RN])


def _pad(lists: pa.ChunkedArray, width: int = 0) -> Ints:
    column = lists.combine_chunks()
    length_R = column.value_lengths().to_numpy()
    padded_RN = np.full((len(column), width or int(length_R.max(initial=0))), NO_ITEM, np.int32)
    padded_RN[np.arange(padded_RN.shape[1]) < length_R[:, None]] = column.flatten().to_numpy()
    return padded_RN


def to_rows(table: pa.Table, window: int) -> Rows:
    """Rows of a table of the "rows" schema."""
    table = table.combine_chunks()
    names = ("user", "position", "target", "time")
    user_R, position_R, target_R, time_R = (table[name].to_numpy() for name in names)
    history_RH = _pad(table["history"], window)
    length_R = (history_RH != NO_ITEM).sum(axis=1, dtype=np.int32)
    return Rows(user_R, position_R, history_RH, length_R, target_R, time_R)
