"""The reference of prepare.py: the same steps as `rsllm prepare`, in one process with Polars.

python experiments/benchmarks/polars_prepare.py WORLD OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl

WINDOW, MIN_HISTORY, MIN_RATING, NUM_CANDIDATES, TRAIN_SHARE, SEED = 10, 3, 3.0, 20, 0.8, 0


def main(world: Path, out: Path) -> None:
    """Read, filter, order, number, split, cut windows, draw candidates, write Parquet."""
    out.mkdir(parents=True)
    items = pl.read_csv(world / "titles.csv").with_row_index("number")
    events = ordered(pl.read_csv(world / "walks.csv"), items)
    users = events.group_by("user").agg(pl.col("time").min(), pl.len()).sort("time", "user")
    users = users.with_row_index("new")
    events = events.join(users.select("user", "new"), on="user").sort("new", "time", "tie")
    user, item = (events[name].to_numpy() for name in ("new", "number"))
    time = events["time"].to_numpy()
    starts = np.flatnonzero(np.diff(user, prepend=user[:1] + 1) != 0)
    position = np.arange(len(user)) - np.repeat(starts, np.diff(np.append(starts, len(user))))
    length = np.minimum(position, WINDOW)
    last = np.diff(user, append=user[-1:] + 1) != 0
    bounds = len(users) * np.array([TRAIN_SHARE, (1 + TRAIN_SHARE) / 2])
    split = np.searchsorted(bounds.astype(np.int64), user, "right")
    for code, name in enumerate(("train", "validation", "test")):
        rows = np.flatnonzero((split == code) & (length >= MIN_HISTORY) & (last | (code == 0)))
        source = (rows - length[rows])[:, None] + np.arange(WINDOW)
        history = np.where(np.arange(WINDOW) < length[rows][:, None], item[source], -1)
        columns = {
            "user": user[rows],
            "position": position[rows],
            "history": history.astype(np.int32),
            "target": item[rows],
            "time": time[rows],
        }
        if code:
            columns["candidates"] = candidates(history, item[rows], len(items))
        pl.DataFrame(columns).write_parquet(out / f"{name}.parquet", compression="zstd")


def ordered(walks: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Kept interactions with item numbers and a hash that orders ties."""
    return (
        walks.filter(pl.col("rating") >= MIN_RATING)
        .unique(["user", "item", "time"])
        .join(items.select("item", "number"), on="item")
        .with_columns(tie=pl.struct("user", "item").hash(SEED))
        .select("user", "number", "time", "tie")
    )


def candidates(history: np.ndarray, target: np.ndarray, num_items: int) -> np.ndarray:
    """The target and 19 distinct items that are neither it nor in the history, shuffled."""
    rng = np.random.default_rng(SEED)
    drawn = np.empty((len(target), NUM_CANDIDATES), np.int32)
    for row, (past, next_item) in enumerate(zip(history, target, strict=True)):
        seen = {*past.tolist(), int(next_item)}
        chosen = [int(next_item)]
        while len(chosen) < NUM_CANDIDATES:
            item = int(rng.integers(num_items))
            if item not in seen:
                seen.add(item)
                chosen.append(item)
        drawn[row] = rng.permutation(chosen)
    return drawn


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
