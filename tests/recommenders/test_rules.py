"""Every rule against a loop over users, rows and items."""

# Axes: R rows, I items, D width of title vectors.
from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from small_data import TITLES, planted_order, small_data

from rsllm.data.prepared import PreparedData
from rsllm.recommenders.rules import (
    RULES,
    item_knn,
    linear_order,
    markov,
    order_rule,
    popularity,
    similarity,
)

NUM_TRAIN = 30
Pairs = list[tuple[int, int]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small", num_train=NUM_TRAIN)


def watched(data: PreparedData) -> dict[int, list[int]]:
    """The items of every training user, in order."""
    events, found = data.events(), defaultdict(list)
    for user, item in zip(events.user_E.tolist(), events.item_E.tolist(), strict=True):
        if user < NUM_TRAIN:
            found[user].append(item)
    return found


def share(data: PreparedData) -> list[float]:
    """Popularity, below 1."""
    counts = Counter(item for items in watched(data).values() for item in items)
    return [counts[item] / (max(counts.values()) + 1) for item in range(len(TITLES))]


def test_popularity(data: PreparedData) -> None:
    rows = data.rows("validation")
    expected_RI = np.tile(share(data), (len(rows), 1))
    np.testing.assert_allclose(popularity(data)(rows), expected_RI, rtol=1e-12)
    assert np.ptp(expected_RI[0]) > 0.3


def test_markov(data: PreparedData) -> None:
    pairs = Counter(pair for items in watched(data).values() for pair in pairwise(items))
    rows, popular = data.rows("validation"), share(data)
    scores_RI = markov(data)(rows)
    assert scores_RI.max() > 1
    for row in range(len(rows)):
        last = int(rows.histories(row)[-1])
        expected = [pairs[last, item] + popular[item] for item in range(len(TITLES))]
        np.testing.assert_allclose(scores_RI[row], expected, rtol=1e-12)


def cosine(first: set[int], second: set[int]) -> float:
    size = (len(first) * len(second)) ** 0.5
    return len(first & second) / size if size else 0.0


@pytest.mark.parametrize("kept", [3, 100])
def test_item_knn(data: PreparedData, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsllm.recommenders.rules.NEIGHBOURS", kept)
    users = defaultdict(set)
    for user, items in watched(data).items():
        for item in items:
            users[item].add(user)
    rows, popular_I = data.rows("validation"), 1e-6 * np.array(share(data))
    scores_RI = item_knn(data)(rows) - popular_I
    for row in range(len(rows)):
        alike_HI = np.array(
            [
                [cosine(users[item], users[seen]) for item in range(len(TITLES))]
                for seen in rows.histories(row).tolist()
            ]
        )
        if kept >= len(TITLES):
            np.testing.assert_allclose(scores_RI[row], alike_HI.sum(0), rtol=1e-9, atol=1e-12)
        # Which of two that are equally alike is kept is not said, but what they count is.
        total = np.sort(alike_HI)[:, -kept:].sum()
        np.testing.assert_allclose(scores_RI[row].sum(), total, rtol=1e-9)


@pytest.mark.parametrize("recency", [1.0, 0.5])
def test_similarity(data: PreparedData, recency: float) -> None:
    vectors_ID = np.random.default_rng(0).normal(size=(len(TITLES), 6))
    vectors_ID[5] = 0.0  # an item that has no vector
    rows = data.rows("validation")
    scores_RI = similarity(vectors_ID, recency)(rows)
    for row in range(len(rows)):
        for item, vector_D in enumerate(vectors_ID):
            expected, weight = 0.0, 1.0
            for seen in reversed(rows.histories(row).tolist()):
                lengths = max(norm(vector_D), 1e-9) * max(norm(vectors_ID[seen]), 1e-9)
                expected += weight * float(vector_D @ vectors_ID[seen]) / lengths
                weight *= recency
            assert scores_RI[row, item] == pytest.approx(expected, abs=1e-12)


def norm(vector: Any) -> float:
    return float(sum(vector**2) ** 0.5)


def matrix(pairs: Pairs, size: int) -> csr_matrix:
    before, after = np.array(pairs).T
    return csr_matrix((np.ones(len(pairs)), (before, after)), shape=(size, size))


def test_linear_order_recovers_a_planted_order() -> None:
    rng, size = np.random.default_rng(0), 40
    order = rng.permutation(size).tolist()
    pairs: Pairs = []
    for _ in range(120):
        some = np.sort(rng.permutation(size)[:20])
        pairs += pairwise([order[place] for place in some])
    assert set(pairwise(order)) <= set(pairs), "no other order fits"
    shuffled = [pairs[i] for i in rng.permutation(len(pairs))]
    place_I = linear_order(matrix(shuffled, size))
    assert [place_I[item] for item in order] == list(range(size))


def test_linear_order_breaks_a_cycle_once() -> None:
    order = np.random.default_rng(1).permutation(12).tolist()
    place_I = linear_order(matrix([*pairwise(order), (order[-1], order[0])], 12))
    assert sorted(place_I) == list(range(12))
    steps = [place_I[after] - place_I[before] for before, after in pairwise([*order, order[0]])]
    assert Counter(steps) == {1: 11, -11: 1}


def test_linear_order_equals_a_loop_where_pairs_contradict_each_other() -> None:
    """First the item that the fewest pairs among those that are left put behind another."""
    before_II = np.random.default_rng(0).integers(4, size=(15, 15))
    left, expected = list(range(15)), []
    while left:
        waits = [sum(before_II[other, item] for other in left if other != item) for item in left]
        expected.append(left.pop(waits.index(min(waits))))
    place_I = linear_order(csr_matrix(before_II.astype(float)))
    assert [place_I[item] for item in expected] == list(range(15))


def test_linear_order_places_items_of_no_pair() -> None:
    assert sorted(linear_order(csr_matrix((5, 5)))) == list(range(5))


def test_order_rule_puts_the_next_item_first(tmp_path: Path) -> None:
    """In data where everybody watches in one order, whoever watches what."""
    data = small_data(tmp_path / "ordered", num_train=100, num_held_out=20, ordered=True)
    rows = data.rows("validation")
    first_R = order_rule(data)(rows).argmax(axis=1)
    last_R = rows.history_RH[np.arange(len(rows)), rows.length_R - 1]
    assert planted_order(first_R).tolist() == (planted_order(last_R) + 1).tolist()


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_row_is_scored_by_itself(data: PreparedData, name: str) -> None:
    rule, rows = RULES[name](data), data.rows("validation")
    order = np.array([4, 0, 2])
    scores_RI = rule(rows)
    assert scores_RI.shape == (len(rows), len(TITLES))
    assert np.array_equal(rule(rows.take(order)), scores_RI[order])
