"""Ordering, duplicates, k-cores and time cuts, against plain loops."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsllm.data.hashing import hash_strings, stream, unit
from rsllm.data.interactions import (
    TIME_BINS,
    TIME_BITS,
    core,
    distinct,
    group_of,
    in_order,
    most_recent,
    time_bins,
    time_cut,
    user_numbers,
)
from rsllm.data.sequences import Events
from rsllm.data.values import MAX_TIME

HASHES = [15049453508330490149, 7695123598714798591, 15049453508330490149]
lines = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)), min_size=1)
Lines = list[tuple[int, int, int]]


def _ordered(rows: Lines, seed: int = 0) -> tuple[list[str], list[tuple[str, int, int]]]:
    users = pa.array([f"u{user}" for user, _, _ in rows])
    items = np.array([item for _, item, _ in rows], np.int32)
    times = np.array([time for _, _, time in rows], np.int64)
    found, _, events, line_E = in_order(users, items, times, hash_strings(list("abcdef"), 0), seed)
    ids = found.to_pylist()
    assert [rows[line][1:] for line in line_E] == [
        (item, time) for item, time in zip(events.item_E, events.time_E, strict=True)
    ]
    columns = (events.user_E, events.item_E, events.time_E)
    return ids, [(ids[u], int(i), int(t)) for u, i, t in zip(*columns, strict=True)]


@given(lines, st.randoms(use_true_random=False))
def test_order_is_by_user_and_time_and_not_by_line(rows: Lines, random: object) -> None:
    ids, events = _ordered(rows)
    assert sorted(events) == sorted((f"u{user}", item, time) for user, item, time in rows)
    keys = [(ids.index(user), time) for user, _, time in events]
    assert keys == sorted(keys)
    shuffled = rows[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert _ordered(shuffled) == (ids, events)


def test_ties_follow_a_hash_and_not_the_item() -> None:
    rows = [(user, item, 1) for user in range(2000) for item in (3, 4)]
    first = [item for _, item, _ in _ordered(rows)[1][::2]]
    assert abs(np.mean([item == 3 for item in first]) - 0.5) < 5 * 0.5 / np.sqrt(2000)
    assert first != [item for _, item, _ in _ordered(rows, seed=1)[1][::2]]


def _events(rows: Lines) -> Events:
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    user, item, time = (np.array(column) for column in zip(*rows, strict=True))
    return Events(user.astype(np.int32), item.astype(np.int32), time.astype(np.int64))


@given(lines)
def test_duplicate_policies_equal_the_words(rows: Lines) -> None:
    rows = sorted(rows, key=lambda row: (row[0], row[2], row[1]))
    events = _events(rows)
    assert distinct(events, "keep").all()
    kept = [rows[i] for i in np.flatnonzero(distinct(events, "event"))]
    assert kept == sorted(set(rows), key=lambda row: (row[0], row[2], row[1]))
    for policy, choose in (("first", min), ("last", max)):
        wanted = {choose(i for i, other in enumerate(rows) if other[:2] == row[:2]) for row in rows}
        assert set(np.flatnonzero(distinct(events, policy))) == wanted  # type: ignore[arg-type]


@given(lines, st.integers(1, 4), st.integers(1, 4))
def test_core_reaches_the_fixed_point_of_the_naive_loop(
    rows: Lines, users: int, items: int
) -> None:
    kept = rows
    while True:
        left = [
            row
            for row in kept
            if sum(other[0] == row[0] for other in kept) >= users
            and sum(other[1] == row[1] for other in kept) >= items
        ]
        if left == kept:
            break
        kept = left
    events, kept_I = _events(rows), np.ones(6, bool)
    while True:
        found = events.take(core(events, kept_I, users))
        weak_I = kept_I & (np.bincount(found.item_E, minlength=6) < items)
        if not weak_I.any():
            break
        kept_I &= ~weak_I
    columns = (found.user_E, found.item_E, found.time_E)
    assert sorted(zip(*(c.tolist() for c in columns), strict=True)) == sorted(kept)


@given(lines, st.integers(0, 5))
def test_most_recent(rows: Lines, number: int) -> None:
    events = _events(rows)
    for user in set(events.user_E.tolist()):
        own = most_recent(events, number)[events.user_E == user]
        keep = min(number, len(own)) if number else len(own)
        assert own.tolist() == [False] * (len(own) - keep) + [True] * keep


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=50), st.integers(1, 99))
def test_a_time_cut_leaves_the_share_before_it(times: list[int], percent: int) -> None:
    times_E = np.array(times, np.int64)
    span = (min(times), max(times))
    bins = np.bincount(time_bins(times_E, *span), minlength=TIME_BINS)
    cut = time_cut(bins, percent / 100, *span)
    assert (times_E < cut).sum() >= percent / 100 * len(times) - 1e-9
    bin_width = -(-(span[1] - span[0] + 1000) // TIME_BINS)
    assert (times_E < cut - bin_width).sum() < percent / 100 * len(times)


def test_whole_seconds_part_as_they_did() -> None:
    """Bins of seconds and of milliseconds hold the same events, and so do both sides of a cut."""
    second_E = np.random.default_rng(0).integers(10**9, size=5000)
    span, total = (int(second_E.min()), int(second_E.max())), int(np.ptp(second_E)) + 1
    expected = (second_E - span[0]) * TIME_BINS // total
    found = time_bins(second_E * 1000, span[0] * 1000, span[1] * 1000)
    assert np.array_equal(found, expected)
    counts = np.bincount(found, minlength=TIME_BINS)
    cut = time_cut(counts, 0.8, span[0] * 1000, span[1] * 1000)
    bins = int((counts.cumsum() < 0.8 * 5000).sum()) + 1
    assert np.array_equal(second_E * 1000 < cut, second_E < span[0] + bins * total / TIME_BINS)


def test_the_last_time_and_user_share_a_key() -> None:
    users, times = pa.array([f"u{n}" for n in range(2000)] * 2), np.repeat([MAX_TIME, 0], 2000)
    _, _, events, _ = in_order(users, np.zeros(4000, np.int32), times, hash_strings(["a"], 0), 0)
    assert np.array_equal(events.user_E, np.repeat(np.arange(2000), 2))
    assert np.array_equal(events.time_E, np.tile([0, MAX_TIME], 2000))
    assert MAX_TIME.bit_length() <= TIME_BITS <= 64 - 22


def test_users_are_numbered_by_first_interaction_then_hash() -> None:
    first = np.array([5, 3, 9, 3, -1], np.int64)
    hashes = np.array([1, 7, 0, 2, 4], np.uint64)
    assert user_numbers(first, hashes, first >= 0).tolist() == [2, 1, 3, 0, -1]


def test_hashes_are_fixed_for_all_time() -> None:
    assert hash_strings(["a", "b", "a"], 0).tolist() == HASHES
    assert hash_strings(["a"], 1)[0] != HASHES[0]
    groups = group_of(pa.array(["a", "b", "a"]), 0, 7)
    assert groups.tolist() == [value % 7 for value in HASHES]


def test_streams_are_splitmix64() -> None:
    """The published test vector of seed 1234567 (Rosetta Code, Splitmix64)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert stream(np.array([1234567], np.uint64), 0, 3).tolist() == [expected]
    values = unit(stream(np.arange(1000, dtype=np.uint64), 0, 100))
    assert ((values > 0) & (values < 1)).all()
    assert values.mean() == pytest.approx(0.5, abs=0.005)
