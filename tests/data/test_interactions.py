"""Filtering, numbering and ordering, against the words of the definition."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rsllm.data.interactions import stable_hash, to_events
from rsllm.errors import DataError

ITEMS = pd.DataFrame({"id": [f"i{n}" for n in range(30)]})


def _interactions(seed: int, rows: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user": [f"u{n}" for n in rng.integers(20, size=rows)],
            "item": [f"i{n}" for n in rng.integers(30, size=rows)],
            "rating": rng.integers(1, 6, size=rows).astype(float),
            "time": rng.integers(40, size=rows),
        }
    )


def test_counts_order_and_numbering_against_a_plain_loop() -> None:
    table = _interactions(0)
    events, counts = to_events(table, ITEMS, min_rating=3, seed=1)
    rated = [r for r in table.itertuples() if r.rating >= 3]
    distinct = {(r.user, r.item, r.time) for r in rated}
    assert counts == {
        "read": 400,
        "below_min_rating": 400 - len(rated),
        "duplicates": len(rated) - len(distinct),
        "kept": len(distinct),
    }
    first = {u: min(t for v, _, t in distinct if v == u) for u, _, _ in distinct}
    assert sorted(events.groupby("user")["time"].min()) == sorted(first.values())
    assert events.groupby("user")["time"].min().is_monotonic_increasing
    assert events.sort_values(["user", "time"], kind="stable").index.is_monotonic_increasing
    counted = sorted((int(i[1:]), t) for _, i, t in distinct)
    assert counted == sorted(zip(events["item"], events["time"], strict=True))


def test_row_order_does_not_matter_and_ties_follow_the_seed() -> None:
    table = _interactions(1)
    events, _ = to_events(table, ITEMS, min_rating=1, seed=0)
    shuffled, _ = to_events(table.sample(frac=1, random_state=3), ITEMS, min_rating=1, seed=0)
    reseeded, _ = to_events(table, ITEMS, min_rating=1, seed=1)
    pd.testing.assert_frame_equal(events, shuffled)
    assert not events["item"].equals(reseeded["item"])


def test_ties_are_not_broken_by_item_number() -> None:
    users = pd.DataFrame({"user": [f"u{n}" for n in range(2000)], "rating": 5.0, "time": 1})
    table = pd.concat([users.assign(item="i3"), users.assign(item="i4")])
    events, _ = to_events(table, ITEMS, min_rating=1, seed=0)
    smaller_first = (events["item"].to_numpy()[::2] == 3).mean()
    assert abs(smaller_first - 0.5) < 5 * 0.5 / np.sqrt(2000)


def test_hash_is_fixed_for_all_time() -> None:
    values = pd.Series(["a", "b", "a"])
    first, _, third = stable_hash(values, 0).tolist()
    assert first == third == 16563745722614342077
    assert stable_hash(values, 1)[0] != first


def test_a_filter_that_leaves_nothing_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.min_rating = 6 or more \(highest: 5\)"):
        to_events(_interactions(2), ITEMS, min_rating=6, seed=0)
