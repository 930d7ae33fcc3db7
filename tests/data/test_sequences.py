"""Windows and splits as algebra; candidate sets and their closed-form metrics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsllm.data.sequences import (
    Catalogue,
    Rows,
    candidate_rng,
    draw_candidates,
    last_of_each_user,
    split_sizes,
    windows,
)
from rsllm.errors import DataError

sequences = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=6)


def _windows(users: list[list[int]], window: int) -> Rows:
    lengths = [len(items) for items in users]
    items = np.array([item for items in users for item in items], np.int32)
    return windows(
        np.repeat(np.arange(len(users), dtype=np.int32), lengths),
        items,
        np.arange(len(items)),
        window,
    )


@given(sequences, st.integers(1, 5))
def test_windows_equal_the_plain_loop(users: list[list[int]], window: int) -> None:
    rows = _windows(users, window)
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


@given(sequences)
def test_last_rows_are_one_per_user(users: list[list[int]]) -> None:
    last = last_of_each_user(_windows(users, 3))
    assert last.user_R.tolist() == list(range(len(users)))
    assert last.target_R.tolist() == [items[-1] for items in users]
    assert last.position_R.tolist() == [len(items) - 1 for items in users]


@given(st.integers(0, 10_000), st.integers(1, 99))
def test_splits_part_the_users(num_users: int, percent: int) -> None:
    sizes = split_sizes(num_users, percent / 100)
    assert sum(sizes.values()) == num_users
    assert sizes["train"] == percent * num_users // 100
    assert 0 <= sizes["test"] - sizes["validation"] <= 1


def test_movielens_split() -> None:
    assert split_sizes(943, 0.8) == {"train": 754, "validation": 94, "test": 95}


TITLES = [f"title {n // 2}" if n < 20 else f"Title {n}" for n in range(60)]
CATALOGUE = Catalogue.of([*TITLES, "TITLE 59"])


def test_catalogue_numbers_titles_by_first_appearance() -> None:
    catalogue = Catalogue.of(["b", "a", "B", "c"])
    assert catalogue.title_keys_I.tolist() == [0, 1, 0, 2]
    assert catalogue.representatives.tolist() == [0, 1, 3]


@given(st.lists(st.integers(0, 60), max_size=10), st.integers(0, 60), st.integers(0, 10**6))
def test_no_equal_titles_and_none_of_the_window(history: list[int], target: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = draw_candidates(rng, np.array(history, np.int32), target, CATALOGUE, 20)
    keys = CATALOGUE.title_keys_I[drawn]
    assert drawn.dtype == np.int32
    assert (drawn == target).sum() == 1
    assert len(set(keys)) == 20
    negatives = drawn[drawn != target]
    assert not set(CATALOGUE.title_keys_I[negatives]) & set(CATALOGUE.title_keys_I[history])
    assert np.isin(negatives, CATALOGUE.representatives).all()


def test_negatives_and_places_are_uniform() -> None:
    history, target, draws = np.array([0, 5, 30], np.int32), 59, 20_000
    rng = np.random.default_rng(0)
    sets = np.array([draw_candidates(rng, history, target, CATALOGUE, 20) for _ in range(draws)])
    counts = np.bincount(sets.ravel(), minlength=61)
    allowed = set(CATALOGUE.representatives.tolist()) - {0, 4, 30, 59}
    assert set(np.flatnonzero(counts).tolist()) == allowed | {59}
    share = 19 / len(allowed)
    error = 5 * np.sqrt(draws * share * (1 - share))
    assert (np.abs(counts[sorted(allowed)] - draws * share) < error).all()
    places = np.bincount(np.nonzero(sets == target)[1], minlength=20)
    assert (np.abs(places - draws / 20) < 5 * np.sqrt(draws * 0.05 * 0.95)).all()


def test_generator_depends_on_the_row_alone() -> None:
    def draw(*row: int, target: int = 50) -> list[int]:
        rng = candidate_rng(0, "test", *row)
        history = np.array([40, 41], np.int32)
        return draw_candidates(rng, history, target, CATALOGUE, 5).tolist()

    assert draw(1, 2, 0) == draw(1, 2, 0)
    assert len({tuple(draw(*row)) for row in ((1, 2, 0), (2, 1, 0), (1, 2, 1))}) == 3
    assert draw(1, 2, 0, target=50).index(50) == draw(1, 2, 0, target=51).index(51)


def test_too_small_a_catalogue_is_refused() -> None:
    small = Catalogue.of(["a", "b", "c", "d"])
    history = np.array([0], np.int32)
    drawn = draw_candidates(np.random.default_rng(0), history, 1, small, 3)
    assert sorted(drawn.tolist()) == [1, 2, 3]
    with pytest.raises(DataError, match=r"lower data\.num_candidates = 4"):
        draw_candidates(np.random.default_rng(0), history, 1, small, 4)
