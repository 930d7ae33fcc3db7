"""A prepared folder made without Ray: a few users who watch random films."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rsllm.config import DataConfig
from rsllm.config.plain import to_dict
from rsllm.data import prepared
from rsllm.data.candidates import draw_candidates, row_keys
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import (
    SPLITS,
    Catalogue,
    Events,
    Rows,
    Split,
    user_targets,
    windows,
)
from rsllm.store.artifacts import commit_dir, write_json

ADJECTIVES = ("Last", "Quiet", "Golden", "Broken", "Secret", "Winter")
NOUNS = ("Matrix", "Garden", "Voyage (1996)", "Letter")
TITLES = [f"The {a} {n}" if len(n) > 6 else f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
TITLES[7] = TITLES[3]  # two items of one title
WINDOW = 4
NUM_CANDIDATES = 5
LENGTH = 7
NUM_SHARDS = 2


def small_data(
    folder: Path,
    *,
    num_train: int = 10,
    num_held_out: int = 6,
    num_draws: int = 1,
    ordered: bool = False,
    **facts: Any,
) -> PreparedData:
    """24 items, 23 titles; `num_train` users of six rows each, and one row per held-out user.

    Args:
        folder: where it goes.
        num_train: training users.
        num_held_out: users of the validation split, and of the test split.
        num_draws: candidate sets per held-out row.
        ordered: everybody watches in `planted_order`.
        facts: further entries of counts.json, such as another domain.
    """
    config = DataConfig(
        source="small",
        window=WINDOW,
        min_history=1,
        num_candidates=NUM_CANDIDATES,
        num_draws=num_draws,
        num_shards=NUM_SHARDS,
    )
    events = _watched(num_train + 2 * num_held_out, ordered)
    split_U = np.repeat(np.arange(3, dtype=np.int32), [num_train, num_held_out, num_held_out])
    split_E = user_targets(events, split_U)
    trained_I = np.bincount(events.item_E[split_E == 0], minlength=len(TITLES))
    catalogue = Catalogue.of(TITLES, trained_I)
    inputs = {"config": to_dict(config), "raw": {}}
    with commit_dir(folder, kind="data", inputs=inputs) as staging:
        ids = [f"i{number}" for number in range(len(TITLES))]
        prepared.write_items(staging / prepared.ITEMS, ids, TITLES, catalogue)
        users = np.arange(len(split_U), dtype=np.int32)
        names = [f"u{number}" for number in users]
        prepared.write_table(staging / prepared.USERS, "users", [users, names])
        _write_parts(staging / "events", "events", events.user_E, list(vars(events).values()))
        rows = windows(events, WINDOW)
        kept_R = rows.length_R >= 1
        train = rows.take((split_E == 0) & kept_R)
        _write_parts(staging / "train", "rows", train.user_R, prepared.row_columns(train))
        for code, split in enumerate(SPLITS[1:], start=1):
            _write_held_out(staging, rows.take(split_E == code), split, catalogue, num_draws)
        write_json(staging / prepared.COUNTS, {"domain": "movie", "family": "", **facts})
    return PreparedData.open(folder)


def _write_parts(folder: Path, kind: str, user_R: Any, columns: list[Any]) -> None:
    table = prepared.to_table(kind, columns)
    for part in range(NUM_SHARDS):
        with prepared.table_writer(folder / f"part-{part:05d}.parquet", kind) as writer:
            writer.write_table(table.take(np.flatnonzero(user_R % NUM_SHARDS == part)))


def _write_held_out(
    folder: Path, rows: Rows, split: Split, catalogue: Catalogue, num_draws: int
) -> None:
    prepared.write_table(folder / f"{split}.parquet", "rows", prepared.row_columns(rows))
    for draw in range(num_draws):
        keys_R = row_keys(0, split, rows.user_R, rows.position_R, draw)
        drawn = draw_candidates(keys_R, rows.history_RH, rows.target_R, catalogue, NUM_CANDIDATES)
        path = prepared.candidates_file(folder, split, draw)
        prepared.write_sets(path, rows, lambda _, drawn=drawn: drawn, len(rows))  # type: ignore[misc]


def planted_order(item: Any) -> Any:
    """The place of each item in an order that is not that of their numbers."""
    return item * 7 % len(TITLES)


def _watched(num_users: int, ordered: bool) -> Events:
    """Every user watches `LENGTH` distinct films, a second each."""
    rng = np.random.default_rng(0)
    films = [rng.permutation(len(TITLES))[:LENGTH] for _ in range(num_users)]
    if ordered:
        films = [film[planted_order(film).argsort()] for film in films]
    users = np.repeat(np.arange(num_users, dtype=np.int32), LENGTH)
    times = np.arange(len(users), dtype=np.int64)
    return Events(users, np.concatenate(films).astype(np.int32), times)
