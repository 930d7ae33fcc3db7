"""The Ray Data pipeline: raw files to a prepared folder, sharded by user."""

# Axes: U users, E events, R rows, C candidates.

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import ray.data
from ray.data.context import DataContext, ShuffleStrategy

from rsllm.config import DataConfig, to_dict
from rsllm.data import raw, synthetic
from rsllm.data.interactions import in_order, to_events
from rsllm.data.prepared import COUNTS, ITEMS, write_items, write_rows
from rsllm.data.sequences import (
    SPLITS,
    Catalogue,
    Ints,
    Rows,
    Split,
    candidate_rng,
    draw_candidates,
    last_of_each_user,
    split_sizes,
    windows,
)
from rsllm.errors import ConfigError, DataError
from rsllm.runs import Store, sha256, write_json

SYNTHETIC_WORLD = {"num_users": 120, "num_items": 60, "length": 16}
MAX_PARTITIONS = 8


def prepare(config: DataConfig, store: Store, fetch: Callable[[str], Path]) -> Path:
    """The prepared folder of `config`, made unless the store has it. Ray must be initialised.

    Reading, filtering and numbering happen here; ordering, windows, candidates and writing in
    Ray tasks, one group of users each. The rows depend neither on the number of blocks nor on
    the order of the raw lines.

    Args:
        config: source, filters, windows, splits.
        store: where the folder is kept; all nodes must see it.
        fetch: gives the raw folder of a named data set.

    Raises:
        ConfigError: no such source, or its folder holds no raw files.
        DataError: broken raw lines, too few titles, or a split without rows.
    """
    with raw_folder(config, fetch) as folder:
        hashes = {path.name: sha256(path) for path in raw.raw_files(folder)}
        inputs = {"config": to_dict(config), "raw": hashes}
        return store.get("data", inputs, lambda staging: _make(config, folder, staging))


@contextlib.contextmanager
def raw_folder(config: DataConfig, fetch: Callable[[str], Path]) -> Iterator[Path]:
    """The folder of `config.source`'s raw files, made or fetched where need be.

    Raises:
        ConfigError: no such source.
    """
    folder = Path(config.source).expanduser()
    if config.source == "synthetic":
        with tempfile.TemporaryDirectory() as world:
            synthetic.write_world(Path(world), **SYNTHETIC_WORLD, seed=config.seed)
            yield Path(world)
    elif folder.is_dir():
        yield folder
    elif len(folder.parts) > 1:
        raise ConfigError(f"data.source {config.source} is no folder; name one with raw files")
    else:
        yield fetch(config.source)


def _make(config: DataConfig, folder: Path, staging: Path) -> None:
    data = raw.read(folder, max_rejected_rows=config.max_rejected_rows)
    ids, titles = data.items["id"].tolist(), data.items["title"].tolist()
    catalogue = write_items(staging / ITEMS, ids, titles)
    _check_catalogue(catalogue, config)
    events, event_counts = to_events(
        data.interactions, data.items, min_rating=config.min_rating, seed=config.seed
    )
    num_users = int(events["user"].max()) + 1
    row_counts = write_splits(events, catalogue, config, staging, num_blocks=config.num_shards)
    _check_splits(row_counts, config)
    _write_rejects(staging / "rejects.jsonl", data.rejects)
    write_json(
        staging / COUNTS,
        {
            "raw": {
                "read": data.rows_read,
                "used": len(data.items) + len(data.interactions),
                "rejected": len(data.rejects),
            },
            "items": len(data.items),
            "distinct_titles": len(catalogue.representatives),
            "interactions": event_counts,
            "users": split_sizes(num_users, config.train_share),
            "rows": row_counts,
        },
    )


def write_splits(
    events: pd.DataFrame,
    catalogue: Catalogue,
    config: DataConfig,
    folder: Path,
    *,
    num_blocks: int,
) -> dict[str, dict[str, int]]:
    """Write the rows of all splits with Ray Data, each file by the task that holds its users.

    Args:
        events: as `rsllm.data.interactions.to_events` makes them, in any order of rows.
        catalogue: all items.
        config: windows, splits, candidates, number of training files.
        folder: where the files go; all nodes must see it.
        num_blocks: blocks the events are cut into; of no influence on the files.

    Returns:
        For each split the rows seen, dropped for a short history, and kept.
    """
    shard_E = _shards(events["user"].to_numpy(), config)
    table = pa.Table.from_pandas(events.assign(shard=shard_E), preserve_index=False)
    size = -(-len(table) // num_blocks)
    blocks = [table.slice(start, size) for start in range(0, len(table), size)]
    _configure_ray_data()
    written = (
        ray.data.from_arrow(blocks)
        .groupby("shard", num_partitions=min(config.num_shards, MAX_PARTITIONS))
        .map_groups(
            partial(_write_shard, catalogue=catalogue, config=config, folder=folder),
            batch_format="pandas",
        )
        .to_pandas()
    )
    totals = written.groupby("split").sum().reindex(list(SPLITS), fill_value=0)
    return {split: {k: int(n) for k, n in totals.loc[split].items()} for split in SPLITS}


def _configure_ray_data() -> None:
    context = DataContext.get_current()
    context.shuffle_strategy = ShuffleStrategy.HASH_SHUFFLE
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _shards(user_E: Ints, config: DataConfig) -> Ints:
    """Files as numbers: training files by ranges of users, then validation, then test."""
    sizes = split_sizes(int(user_E.max()) + 1, config.train_share)
    train_E = user_E.astype(np.int64) * config.num_shards // max(sizes["train"], 1)
    held_out_E = config.num_shards + (user_E >= sizes["train"] + sizes["validation"])
    return np.where(user_E < sizes["train"], train_E, held_out_E).astype(np.int32)


def _split_and_file(shard: int, num_shards: int) -> tuple[Split, str]:
    if shard < num_shards:
        return "train", f"train/part-{shard:05d}.parquet"
    split: Split = "validation" if shard == num_shards else "test"
    return split, f"{split}.parquet"


def _write_shard(
    events: pd.DataFrame, *, catalogue: Catalogue, config: DataConfig, folder: Path
) -> pd.DataFrame:
    """Write the file of one group of users; return its split and row counts."""
    split, file = _split_and_file(int(events["shard"].iloc[0]), config.num_shards)
    events = in_order(events)
    seen = windows(
        events["user"].to_numpy(np.int32),
        events["item"].to_numpy(np.int32),
        events["time"].to_numpy(np.int64),
        config.window,
    )
    if split != "train":
        seen = last_of_each_user(seen)
    rows = seen.take(seen.length_R >= config.min_history)
    if split != "train":
        rows = _with_candidates(rows, split, catalogue, config)
    write_rows(folder / file, rows)
    counts = {"seen": len(seen), "short_history": len(seen) - len(rows), "kept": len(rows)}
    return pd.DataFrame([{"split": split, **counts}])


def _with_candidates(rows: Rows, split: Split, catalogue: Catalogue, config: DataConfig) -> Rows:
    candidates_RC = np.empty((len(rows), config.num_candidates), np.int32)
    for i, (user, position, target) in enumerate(
        zip(rows.user_R, rows.position_R, rows.target_R, strict=True)
    ):
        rng = candidate_rng(config.seed, split, int(user), int(position), epoch=0)
        candidates_RC[i] = draw_candidates(
            rng, rows.histories(i), int(target), catalogue, config.num_candidates
        )
    return dataclasses.replace(rows, candidates_RC=candidates_RC)


def _check_catalogue(catalogue: Catalogue, config: DataConfig) -> None:
    titles, needed = len(catalogue.representatives), config.window + config.num_candidates
    if titles < needed:
        raise DataError(
            f"{titles} distinct titles are too few for data.window = {config.window} and"
            f" data.num_candidates = {config.num_candidates}, which need {needed}; lower them"
        )


def _check_splits(rows: dict[str, dict[str, int]], config: DataConfig) -> None:
    for split, counts in rows.items():
        if not counts["kept"]:
            raise DataError(
                f"the {split} split is empty: {counts['short_history']:,} of {counts['seen']:,}"
                f" rows have a history shorter than data.min_history = {config.min_history}; lower"
                f" it, give more users or change data.train_share = {config.train_share}"
            )


def _write_rejects(path: Path, rejects: list[raw.Reject]) -> None:
    if rejects:
        lines = (json.dumps(dataclasses.asdict(reject), sort_keys=True) for reject in rejects)
        path.write_text("".join(f"{line}\n" for line in lines))
