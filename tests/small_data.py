"""A prepared folder made without Ray: a few users who watch random films."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from rsllm.data.prepared import COUNTS, ITEMS, Catalogue, PreparedData, write_items, write_rows
from rsllm.data.sequences import (
    Rows,
    Split,
    candidate_rng,
    draw_candidates,
    last_of_each_user,
    windows,
)
from rsllm.runs import commit_dir, write_json

ADJECTIVES = ("Last", "Quiet", "Golden", "Broken", "Secret", "Winter")
NOUNS = ("Matrix", "Garden", "Voyage (1996)", "Letter")
TITLES = [f"The {a} {n}" if len(n) > 6 else f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
TITLES[7] = TITLES[3]  # two items of one title
WINDOW = 4
NUM_CANDIDATES = 5
LENGTH = 7


def small_data(folder: Path, *, num_train: int = 10, num_held_out: int = 6) -> PreparedData:
    """24 items, 23 titles; `num_train` users of six rows each, and one row per held-out user."""
    ends = np.cumsum([num_train, num_held_out, num_held_out])
    seen = _watched(int(ends[-1]))
    with commit_dir(folder, inputs={"config": {"window": WINDOW}}) as staging:
        catalogue = write_items(staging / ITEMS, [str(i) for i in range(len(TITLES))], TITLES)
        train = seen.take(seen.user_R < ends[0])
        for part, rows in enumerate((train.take(train.user_R < 3), train.take(train.user_R >= 3))):
            write_rows(staging / "train" / f"part-{part:05d}.parquet", rows)
        splits: tuple[Split, Split] = ("validation", "test")
        for split, start, end in zip(splits, ends[:-1], ends[1:], strict=True):
            rows = last_of_each_user(seen.take((seen.user_R >= start) & (seen.user_R < end)))
            write_rows(staging / f"{split}.parquet", _with_candidates(rows, split, catalogue))
        write_json(staging / COUNTS, {})
    return PreparedData.open(folder)


def _watched(num_users: int) -> Rows:
    """Every user's watched films as rows; the first film has no history and is no row."""
    rng = np.random.default_rng(0)
    films = [rng.permutation(len(TITLES))[:LENGTH] for _ in range(num_users)]
    users = np.repeat(np.arange(num_users, dtype=np.int32), LENGTH)
    times = np.arange(len(users), dtype=np.int64)
    rows = windows(users, np.concatenate(films).astype(np.int32), times, WINDOW)
    return rows.take(rows.length_R >= 1)


def _with_candidates(rows: Rows, split: Split, catalogue: Catalogue) -> Rows:
    drawn = [
        draw_candidates(
            candidate_rng(0, split, int(rows.user_R[i]), int(rows.position_R[i]), epoch=0),
            rows.histories(i),
            int(rows.target_R[i]),
            catalogue,
            NUM_CANDIDATES,
        )
        for i in range(len(rows))
    ]
    return replace(rows, candidates_RC=np.stack(drawn))
