"""Windows and splits as algebra; candidate sets against their definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsllm.data.candidates import Sampling, draw_candidates, row_keys
from rsllm.data.sequences import (
    Catalogue,
    Events,
    Ints,
    leave_one_out_targets,
    split_sizes,
    time_targets,
    user_targets,
    windows,
)
from rsllm.errors import DataError

sequences = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=6)
SAMPLINGS: tuple[Sampling, ...] = ("uniform", "popularity", "full")


def _events(users: list[list[int]], times: list[int] | None = None) -> Events:
    lengths = [len(items) for items in users]
    items = np.array([item for items in users for item in items], np.int32)
    times_E = np.arange(len(items)) if times is None else np.array(times[: len(items)], np.int64)
    return Events(np.repeat(np.arange(len(users), dtype=np.int32), lengths), items, times_E)


@given(sequences, st.integers(1, 5))
def test_windows_equal_the_plain_loop(users: list[list[int]], window: int) -> None:
    rows = windows(_events(users), window)
    expected = [
        (user, position, items[max(0, position - window) : position], items[position])
        for user, items in enumerate(users)
        for position in range(len(items))
    ]
    found = [
        (int(u), int(p), rows.histories(i).tolist(), int(t))
        for i, (u, p, t) in enumerate(zip(rows.user_R, rows.position_R, rows.target_R, strict=True))
    ]
    assert found == expected
    assert ((rows.history_RH == -1).sum(axis=1) == window - rows.length_R).all()


@settings(max_examples=1000)
@given(sequences, st.data())
def test_a_user_split_holds_out_last_events(users: list[list[int]], data: st.DataObject) -> None:
    split_U = data.draw(
        st.lists(st.integers(0, 2), min_size=len(users), max_size=len(users)), label="splits"
    )
    found = user_targets(_events(users), np.array(split_U, np.int32)).tolist()
    expected = [
        split if split == 0 or position == len(items) - 1 else -1
        for split, items in zip(split_U, users, strict=True)
        for position in range(len(items))
    ]
    assert found == expected


@settings(max_examples=1000)
@given(sequences)
def test_leave_one_out_takes_two_from_each_end(users: list[list[int]]) -> None:
    expected = [
        [0] * len(items) if len(items) < 3 else [0] * (len(items) - 2) + [1, 2] for items in users
    ]
    found = leave_one_out_targets(_events(users)).tolist()
    assert found == list(itertools.chain(*expected))


@settings(max_examples=1000)
@given(sequences, st.lists(st.integers(0, 9), min_size=54, max_size=54), st.integers(0, 9))
def test_time_cuts_part_past_from_future(
    users: list[list[int]], times: list[int], cut: int
) -> None:
    later = min(cut + 2, 9)
    ordered: list[int] = []
    for items in users:
        start = len(ordered)
        ordered += sorted(times[start : start + len(items)])
    events = _events(users, ordered)
    split_E = time_targets(events, cut, later)
    assert ((split_E == 0) == (events.time_E < cut)).all()
    for user in range(len(users)):
        own = [
            (t, s)
            for t, s, u in zip(events.time_E, split_E, events.user_E, strict=True)
            if u == user
        ]
        for code, low, high in ((1, cut, later), (2, later, 99)):
            inside = [split for time, split in own if low <= time < high]
            assert inside == [code, *[-1] * (len(inside) - 1)][: len(inside)]


@given(st.integers(0, 10_000), st.integers(1, 99))
def test_splits_part_the_users(num_users: int, percent: int) -> None:
    sizes = split_sizes(num_users, percent / 100)
    assert sum(sizes.values()) == num_users
    assert sizes["train"] == percent * num_users // 100
    assert 0 <= sizes["test"] - sizes["validation"] <= 1


def test_movielens_split() -> None:
    assert split_sizes(943, 0.8) == {"train": 754, "validation": 94, "test": 95}


TITLES = [f"title {n // 2}" if n < 20 else f"Title {n}" for n in range(60)]
COUNTS = np.arange(61) % 7
CATALOGUE = Catalogue.of([*TITLES, "TITLE 59"], COUNTS)


def _draw(
    keys: int | Ints,
    history: list[int],
    target: int,
    size: int,
    sampling: Sampling = "uniform",
    catalogue: Catalogue = CATALOGUE,
) -> Ints:
    rows = np.atleast_1d(keys).astype(np.int32)
    keys_R = row_keys(0, "test", rows, rows, 0)
    history_RH = np.tile(np.array([*history, -1], np.int32), (len(rows), 1))
    target_R = np.full(len(rows), target, np.int32)
    return draw_candidates(keys_R, history_RH, target_R, catalogue, size, sampling)


def test_catalogue_numbers_titles_by_first_appearance() -> None:
    catalogue = Catalogue.of(["b", "a", "B", "c"], np.array([0, 2, 3, 0]))
    assert catalogue.title_keys_I.tolist() == [0, 1, 0, 2]
    assert catalogue.representatives.tolist() == [0, 1, 3]
    assert catalogue.weights().tolist() == [4, 3, 1]
    warm = Catalogue.of(["b", "a", "B", "c"], np.array([0, 2, 3, 0]), cold=False)
    assert warm.representatives.tolist() == [2, 1]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@given(st.lists(st.integers(0, 60), max_size=10), st.integers(0, 60), st.integers(0, 10**6))
def test_no_equal_titles_and_none_of_the_window(
    sampling: Sampling, history: list[int], target: int, row: int
) -> None:
    (drawn,) = _draw(row, history, target, 20, sampling)
    keys = CATALOGUE.title_keys_I[drawn]
    assert drawn.dtype == np.int32
    assert (drawn == target).sum() == 1
    assert len(set(keys)) == len(keys)
    seen = {*CATALOGUE.title_keys_I[history], CATALOGUE.title_keys_I[target]}
    negatives = drawn[drawn != target]
    assert not set(CATALOGUE.title_keys_I[negatives]) & seen
    assert np.isin(negatives, CATALOGUE.representatives).all()
    allowed = set(CATALOGUE.title_keys_I) - seen
    assert len(drawn) == (1 + len(allowed) if sampling == "full" else 20)


@pytest.mark.parametrize("size", [20, 45])
def test_negatives_and_places_are_uniform(size: int) -> None:
    """Also where the set is most of the pool, so that hardly any row is drawn in one go."""
    history, target, draws = [0, 5, 30], 59, 20_000
    sets = _draw(np.arange(draws), history, target, size)
    counts = np.bincount(sets.ravel(), minlength=61)
    allowed = set(CATALOGUE.representatives.tolist()) - {0, 4, 30, 59}
    assert set(np.flatnonzero(counts).tolist()) == allowed | {59}
    share = (size - 1) / len(allowed)
    error = 5 * np.sqrt(draws * share * (1 - share))
    assert (np.abs(counts[sorted(allowed)] - draws * share) < error).all()
    places = np.bincount(np.nonzero(sets == target)[1], minlength=size)
    assert (np.abs(places - draws / size) < 5 * np.sqrt(draws / size)).all()


@pytest.mark.parametrize("size", [3, 5])
def test_popularity_is_successive_sampling(size: int) -> None:
    """Shares of every ordered outcome's set, from the definition, on a catalogue of five."""
    catalogue = Catalogue.of(list("abcdef"), np.array([9, 0, 1, 3, 5, 7]))
    weights = catalogue.weights()[1:]
    expected = np.zeros(6)
    for order in itertools.permutations(range(5), size - 1):
        chance, left = 1.0, weights.sum()
        for place in order:
            chance, left = chance * weights[place] / left, left - weights[place]
        expected[[place + 1 for place in order]] += chance
    draws = 20_000
    sets = _draw(np.arange(draws), [], 0, size, "popularity", catalogue)
    found = np.bincount(sets[sets != 0], minlength=6) / draws
    assert np.abs(found - expected).max() < 5 * 0.5 / np.sqrt(draws)


def test_full_sets_are_padded_behind_the_shorter_ones() -> None:
    history_RH = np.array([[1, 2], [3, -1]], np.int32)
    target_R = np.array([0, 0], np.int32)
    catalogue = Catalogue.of(list("abcdef"), np.ones(6, np.int64))
    drawn = draw_candidates(
        np.arange(2, dtype=np.uint64), history_RH, target_R, catalogue, 2, "full"
    )
    assert sorted(drawn[0]) == [-1, 0, 3, 4, 5]
    assert drawn[0, -1] == -1
    assert sorted(drawn[1]) == [0, 1, 2, 4, 5]


def test_keys_depend_on_the_row_alone() -> None:
    rows = np.arange(50, dtype=np.int32)
    grid = [
        row_keys(seed, split, np.repeat(rows, 50), np.tile(rows, 50), draw)
        for seed in (0, 1)
        for split in ("train", "test")
        for draw in (0, 1)
    ]
    assert len(np.unique(np.concatenate(grid))) == 8 * 2500
    places = [int(np.flatnonzero(_draw(7, [40, 41], t, 5)[0] == t)[0]) for t in (50, 51, 3)]
    assert len(set(places)) == 1


def test_one_row_is_drawn_as_among_many() -> None:
    many = _draw(np.arange(300), [1, 2], 9, 20)
    assert (many[123] == _draw(123, [1, 2], 9, 20)[0]).all()


def test_too_small_a_catalogue_is_refused() -> None:
    small = Catalogue.of(["a", "b", "c", "d"], np.zeros(4, np.int64))
    assert sorted(_draw(0, [0], 1, 3, catalogue=small)[0]) == [1, 2, 3]
    with pytest.raises(DataError, match=r"4 distinct titles .* lower data\.num_candidates"):
        _draw(0, [0], 1, 4, catalogue=small)


def test_shuffling_moves_the_real_items_of_each_history_alone() -> None:
    rng = np.random.default_rng(0)
    rows = windows(_events([rng.permutation(30)[:12].tolist() for _ in range(40)]), 6)
    shuffled = rows.shuffled(3)
    for row, length in enumerate(rows.length_R.tolist()):
        assert sorted(shuffled.histories(row)) == sorted(rows.histories(row))
        assert shuffled.history_RH[row, length:].tolist() == [-1] * (6 - length)
    same = [name for name in vars(rows) if getattr(shuffled, name) is getattr(rows, name)]
    assert {*vars(rows)} - {*same} == {"history_RH"}


def test_shuffling_depends_on_seed_and_row_alone() -> None:
    rows = windows(_events([list(range(12))] * 40), 6)
    shuffled_RH, some = rows.shuffled(3).history_RH, np.array([400, 7, 99])
    assert np.array_equal(rows.take(some).shuffled(3).history_RH, shuffled_RH[some])
    assert not np.array_equal(rows.shuffled(4).history_RH, shuffled_RH)


def test_every_order_of_a_history_is_as_likely() -> None:
    rows = windows(_events([list(range(4))] * 6000), 3)
    orders = rows.take(rows.position_R == 3).shuffled(0).history_RH
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 4.5 * (6000 * 1 / 6 * 5 / 6) ** 0.5
