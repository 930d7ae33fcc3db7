"""Sequences out of training rows, and the windows that ask for each of their items once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import LENGTH, small_data

from rsllm.data.histories import Histories
from rsllm.data.sequences import Events, Ints, Rows, windows

USERS = st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=30), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31)


def training_rows(users: list[list[int]], window: int, shortest: int = 1) -> Rows:
    """One row per interaction that has a history long enough, in an order of chance."""
    items = np.array([item for own in users for item in own], np.int32)
    numbers = np.repeat(np.arange(len(users), dtype=np.int32), [len(own) for own in users])
    rows = windows(Events(numbers, items, np.arange(len(items))), window)
    rows = rows.take(rows.length_R >= shortest)
    return rows.take(np.random.default_rng(0).permutation(len(rows)))


def sequences(histories: Histories) -> list[tuple[int, list[int]]]:
    """User and items of each."""
    parts = np.split(histories.item_E, histories.start_S[1:])
    return [
        (user, part.tolist()) for user, part in zip(histories.user_S.tolist(), parts, strict=True)
    ]


def put_together(rows: Rows) -> list[tuple[int, list[int]]]:
    """By looking for each row's successor, one after another."""
    by_place = {
        (int(user), int(position)): row
        for row, (user, position) in enumerate(zip(rows.user_R, rows.position_R, strict=True))
    }
    found = []
    for user, position in sorted(by_place):
        if (user, position - 1) in by_place:
            continue
        items = rows.histories(by_place[user, position]).tolist()
        while (user, position) in by_place:
            items.append(int(rows.target_R[by_place[user, position]]))
            position += 1
        found.append((user, items))
    return found


@given(USERS, st.integers(1, 6), st.integers(1, 4), st.data())
def test_sequences_are_put_together_again(
    users: list[list[int]], window: int, shortest: int, data: st.DataObject
) -> None:
    """Also where rows are missing in the midst: what is left of a user is several sequences."""
    rows = training_rows(users, window, min(shortest, window))
    kept = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)), label="kept")
    if any(kept):
        rows = rows.take(np.array(kept))
        assert sequences(Histories.of(rows, 5)) == put_together(rows)


@given(USERS, st.integers(1, 6))
def test_without_gaps_they_are_what_users_did(users: list[list[int]], window: int) -> None:
    histories = Histories.of(training_rows(users, window), 5)
    assert sequences(histories) == list(enumerate(users))


def test_a_gap_parts_two_sequences_of_a_user() -> None:
    """Interactions 5 and 6 are no targets; what stood before number 7 is its history."""
    rows = training_rows([list(range(10)), [20, 21]], window=3)
    rows = rows.take(~np.isin(rows.position_R, [5, 6]))
    expected = [(0, [0, 1, 2, 3, 4]), (0, [4, 5, 6, 7, 8, 9]), (1, [20, 21])]
    assert sequences(Histories.of(rows, 4)) == expected


def whole_epoch(histories: Histories, epoch: int, seed: int = 0) -> list[tuple[int, Ints]]:
    found = histories.windows([(epoch, number) for number in range(len(histories))], seed)
    return [(user, items) for user, items, _ in found]


@given(USERS, st.integers(1, 12), SEEDS)
def test_every_item_but_the_first_is_asked_for_once_an_epoch(
    users: list[list[int]], longest: int, seed: int
) -> None:
    histories = Histories.of(training_rows(users, 4), longest)
    expected = Counter((user, item) for user, own in enumerate(users) for item in own[1:])
    for epoch in range(3):
        found = whole_epoch(histories, epoch, seed)
        assert Counter((user, item) for user, own in found for item in own[1:].tolist()) == expected
        assert all(2 <= len(own) <= longest + 1 for _, own in found)
        for user, own in enumerate(users):  # in turn, each window where the one before ends
            parts = [items.tolist() for of, items in found if of == user]
            assert parts[0] + [item for part in parts[1:] for item in part[1:]] == own
            assert len(parts) == -(-(len(own) - 1) // longest), "and no more windows than needed"


def test_cuts_move_from_epoch_to_epoch() -> None:
    """Each item begins a window at times, and stands at its end: no place is always blind."""
    histories = Histories.of(training_rows([list(range(25)), [30, 31, 32]], 4), 10)
    begins: set[int] = set()
    for epoch in range(60):
        _, second, _ = (items for user, items in whole_epoch(histories, epoch) if user == 0)
        begins.add(int(second[0]))
        assert len(second) == 11, "windows are full but for the first and the last"
    assert begins == set(range(4, 11)), "24 items leave 6 of the room of 30 free"
    short = {tuple(items) for epoch in range(9) for u, items in whole_epoch(histories, epoch) if u}
    assert short == {(30, 31, 32)}, "what fits into one window is never cut"


@given(USERS, st.integers(1, 8), SEEDS, st.data())
def test_a_window_depends_on_seed_epoch_and_number_alone(
    users: list[list[int]], longest: int, seed: int, data: st.DataObject
) -> None:
    histories = Histories.of(training_rows(users, 4), longest)
    numbers = st.integers(0, len(histories) - 1)
    places = data.draw(st.lists(st.tuples(st.integers(0, 9), numbers), min_size=1), label="places")
    together = histories.windows(places, seed)
    alone = [histories.windows([place], seed)[0] for place in places]
    for found, expected in zip(together, alone, strict=True):
        assert found[0] == expected[0]
        assert found[1].tolist() == expected[1].tolist()
        assert found[2] == expected[2]


def test_seeds_epochs_and_windows_have_keys_of_their_own() -> None:
    histories = Histories.of(training_rows([list(range(40))] * 5, 4), 10)
    numbers = range(len(histories))
    keys = [
        key
        for seed in range(3)
        for epoch in range(3)
        for _, _, key in histories.windows([(epoch, number) for number in numbers], seed)
    ]
    assert len(set(keys)) == len(keys) == 9 * 5 * 4


@pytest.mark.parametrize("longest", [1, 20])
def test_sequences_of_two_items_ask_once(longest: int) -> None:
    histories = Histories.of(training_rows([[5, 6], [7, 5]], 4), longest)
    assert len(histories) == 2
    assert [(user, own.tolist()) for user, own in whole_epoch(histories, 3)] == [
        (0, [5, 6]),
        (1, [7, 5]),
    ]


def test_a_shortest_history_of_three_is_the_start_of_its_sequence() -> None:
    """Its items are asked for too: all that a user did in training can teach."""
    histories = Histories.of(training_rows([[1, 2, 3, 4, 5], [6, 7, 8]], 5, shortest=3), 10)
    assert sequences(histories) == [(0, [1, 2, 3, 4, 5])]


def test_prepared_rows_hold_nothing_but_training(tmp_path: Path) -> None:
    data = small_data(tmp_path / "small")
    histories = Histories.of(data.rows("train"), 4)
    assert len(histories.user_S) == 10
    assert histories.size_S.tolist() == [LENGTH - 1] * 10
    assert set(histories.user_S) == set(data.rows("train").user_R)
