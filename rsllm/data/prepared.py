"""The prepared folder: items and rows as Parquet, written by `rsllm.data.shards`, read here.

`items.parquet`, `train/part-*.parquet`, `validation.parquet`, `test.parquet` and `counts.json`,
with `rejects.jsonl` when raw lines were refused. Rows are sorted by user, then position.
"""

# Axes: R rows, H history, C candidates, I items.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rsllm.data.sequences import NO_ITEM, Catalogue, Ints, Rows, Split
from rsllm.errors import DataError
from rsllm.runs import manifest, read_json

__all__ = ["COUNTS", "ITEMS", "Catalogue", "PreparedData", "Rows", "write_items", "write_rows"]

ITEMS = "items.parquet"
COUNTS = "counts.json"

_ITEM_SCHEMA = pa.schema(
    [
        ("item", pa.int32()),
        ("source_id", pa.string()),
        ("title", pa.string()),
        ("title_key", pa.int32()),
        ("representative", pa.bool_()),
    ]
)
_TRAIN_SCHEMA = pa.schema(
    [
        ("user", pa.int32()),
        ("position", pa.int32()),
        ("history", pa.list_(pa.int32())),
        ("target", pa.int32()),
        ("time", pa.int64()),
    ]
)
_HELD_OUT_SCHEMA = _TRAIN_SCHEMA.append(pa.field("candidates", pa.list_(pa.int32())))


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set.

    Attributes:
        path: its folder.
        titles: the title of each item.
        catalogue: which items bear equal titles.
        facts: the manifest, and under "counts" the rows and users at each step.
    """

    path: Path
    titles: list[str]
    catalogue: Catalogue
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> PreparedData:
        """Open a folder made by `rsllm.data.shards.prepare`, after checking every file's hash.

        Raises:
            CheckpointError: a file is missing or altered.
            DataError: a file has another schema.
        """
        facts = {**manifest(path, verify=True), "counts": read_json(path / COUNTS)}
        items = _read(path / ITEMS, _ITEM_SCHEMA)
        title_keys_I = items["title_key"].to_numpy()
        representatives = np.flatnonzero(items["representative"].to_numpy()).astype(np.int32)
        catalogue = Catalogue(title_keys_I, representatives)
        return cls(path, items["title"].to_pylist(), catalogue, facts)

    @property
    def title_keys(self) -> Ints:
        """The number of each item's distinct title."""
        return self.catalogue.title_keys_I

    def rows(self, split: Split) -> Rows:
        """The rows of a split by user and position; only `rows("test")` opens the test file.

        Raises:
            DataError: a file has another schema.
        """
        window: int = self.facts["inputs"]["config"]["window"]
        if split != "train":
            return _to_rows(_read(self.path / f"{split}.parquet", _HELD_OUT_SCHEMA), window)
        parts = sorted((self.path / "train").glob("part-*.parquet"))
        return _to_rows(pa.concat_tables([_read(part, _TRAIN_SCHEMA) for part in parts]), window)


def write_items(path: Path, source_ids: Sequence[str], titles: Sequence[str]) -> Catalogue:
    """Write the item table and return its catalogue."""
    catalogue = Catalogue.of(titles)
    number_I = np.arange(len(titles), dtype=np.int32)
    representative_I = np.isin(number_I, catalogue.representatives)
    columns = [number_I, source_ids, titles, catalogue.title_keys_I, representative_I]
    _write(pa.Table.from_arrays([pa.array(c) for c in columns], schema=_ITEM_SCHEMA), path)
    return catalogue


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows, with their candidates if they have any."""
    columns = [
        pa.array(rows.user_R),
        pa.array(rows.position_R),
        _to_lists(rows.history_RH, rows.length_R),
        pa.array(rows.target_R),
        pa.array(rows.time_R),
    ]
    schema = _TRAIN_SCHEMA
    if rows.candidates_RC is not None:
        schema = _HELD_OUT_SCHEMA
        size_R = np.full(len(rows), rows.candidates_RC.shape[1], np.int32)
        columns.append(_to_lists(rows.candidates_RC, size_R))
    _write(pa.Table.from_arrays(columns, schema=schema), path)


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        found = file.schema_arrow
        if not found.equals(schema):
            drifted = [f.name for f in schema if f not in [*found]]
            surplus = [f.name for f in found if f.name not in schema.names]
            names = ", ".join(drifted + surplus)
            raise DataError(f"{path} has another schema (column {names}); prepare the data again")
        return file.read()


def _to_lists(padded_RN: Ints, length_R: Ints) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(length_R)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, padded_RN[_filled(length_R, padded_RN.shape[1])])


def _to_rows(table: pa.Table, window: int) -> Rows:
    table = table.combine_chunks()
    history = table["history"].combine_chunks()
    length_R = history.value_lengths().to_numpy()
    history_RH = np.full((len(table), window), NO_ITEM, np.int32)
    history_RH[_filled(length_R, window)] = history.flatten().to_numpy()
    rows = Rows(
        user_R=table["user"].to_numpy(),
        position_R=table["position"].to_numpy(),
        history_RH=history_RH,
        length_R=length_R,
        target_R=table["target"].to_numpy(),
        time_R=table["time"].to_numpy(),
    )
    if "candidates" not in table.column_names:
        return rows
    candidates = table["candidates"].combine_chunks().flatten().to_numpy()
    return replace(rows, candidates_RC=candidates.reshape(len(rows), -1))


def _filled(length_R: Ints, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.arange(width) < length_R[:, None]
