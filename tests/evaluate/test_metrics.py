from __future__ import annotations

from itertools import combinations
from math import log2

import numpy as np
import pytest

from rsllm.errors import EvaluationError
from rsllm.evaluate.metrics import (
    expected_metrics,
    order_bias,
    rank_metrics,
    strict_verdict,
    target_ranks,
    verdict,
)


def test_ranks_equal_a_naive_count() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(200, 8)).astype(float)  # many ties
    target = rng.integers(0, 8, size=200)
    naive = [
        1 + sum(row[c] >= row[t] for c in range(8) if c != t)
        for row, t in zip(scores, target, strict=True)
    ]
    assert target_ranks(scores, target).tolist() == naive


def test_ties_count_against_the_target() -> None:
    assert target_ranks(np.zeros((1, 20)), np.array([3])).tolist() == [20]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_score_is_refused_by_row(value: float) -> None:
    scores = np.zeros((3, 4))
    scores[1, 2] = value
    with pytest.raises(EvaluationError, match="row 1"):
        target_ranks(scores, np.zeros(3, dtype=int))


def test_misfit_targets_are_refused() -> None:
    with pytest.raises(EvaluationError, match="do not fit"):
        target_ranks(np.zeros((3, 4)), np.zeros(2, dtype=int))
    with pytest.raises(EvaluationError, match="row 2 has its target in column -1"):
        target_ranks(np.zeros((3, 4)), np.array([0, 3, -1]))


def test_rank_metrics_by_hand() -> None:
    values = rank_metrics(np.array([1, 3, 7, 11]))
    expected = {
        "HR@1": [1, 0, 0, 0],
        "HR@5": [1, 1, 0, 0],
        "HR@10": [1, 1, 1, 0],
        "NDCG@5": [1, 1 / log2(4), 0, 0],
        "NDCG@10": [1, 1 / log2(4), 1 / log2(8), 0],
        "MRR": [1, 1 / 3, 1 / 7, 1 / 11],
    }
    assert list(values) == list(expected)
    for name, column in expected.items():
        np.testing.assert_allclose(values[name], column)


@pytest.mark.parametrize(("num_better", "pool", "num_negatives"), [(0, 7, 3), (3, 9, 4), (9, 9, 6)])
def test_expectation_equals_enumeration(num_better: int, pool: int, num_negatives: int) -> None:
    draws = combinations(range(pool), num_negatives)  # items below num_better outscore the target
    ranks = np.array([1 + sum(item < num_better for item in draw) for draw in draws])
    expected = {name: values.mean() for name, values in rank_metrics(ranks).items()}
    actual = expected_metrics([num_better], [pool], num_negatives)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], [value], atol=1e-12)


def test_expectation_equals_simulation_from_scores() -> None:
    rng = np.random.default_rng(1)
    scores, draws = rng.normal(size=500), 20_000
    target = np.argsort(scores)[-60]
    others = np.delete(np.arange(500), target)
    negatives = others[np.argsort(rng.random((draws, 499)), axis=1)[:, :19]]
    candidates = np.column_stack([np.full(draws, target), negatives])
    simulated = rank_metrics(target_ranks(scores[candidates], np.zeros(draws, dtype=int)))
    exact = expected_metrics([(scores[others] >= scores[target]).sum()], [499], 19)
    for name, values in simulated.items():
        tolerance = 1e-4 + 4 * values.std() / draws**0.5
        assert exact[name][0] == pytest.approx(values.mean(), abs=tolerance)


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(EvaluationError, match="row 1 has 11 better items in a pool of 10"):
        expected_metrics([3, 11], [10, 10], 5)
    with pytest.raises(EvaluationError, match="19 negatives"):
        expected_metrics([3], [10], 19)


TITLES = ["Heat (1995)", "Alien", "Aliens", "Casino"]


@pytest.mark.parametrize(
    ("answer", "target", "loose", "strict"),
    [
        ("Heat (1995)", 0, (True, True), (True, True)),
        ("  HEAT (1995) \nCasino", 0, (True, True), (True, True)),
        ("\n\nCasino", 3, (True, True), (True, True)),
        ("The answer is Casino.", 3, (True, True), (False, False)),
        ("Casino", 0, (True, False), (True, False)),
        ("Alien", 1, (True, True), (True, True)),
        ("Aliens", 2, (False, False), (True, True)),  # contains another candidate's title
        ("Heat (1995) or Casino", 0, (False, False), (False, False)),
        ("Titanic", 0, (False, False), (False, False)),
        ("", 0, (False, False), (False, False)),
        ("Titanic\nHeat (1995)", 0, (False, False), (False, False)),
        ("\ufffd\x00\u202e", 0, (False, False), (False, False)),
    ],
)
def test_every_answer_has_one_verdict(
    answer: str, target: int, loose: tuple[bool, bool], strict: tuple[bool, bool]
) -> None:
    judged = verdict(answer, TITLES, target)
    assert (judged.valid, judged.hit) == loose
    judged = strict_verdict(answer, TITLES, target)
    assert (judged.valid, judged.hit) == strict


def test_equal_titles_are_ambiguous() -> None:
    assert not verdict("Heat", ["Heat", "heat "], 0).valid
    assert not strict_verdict("Heat", ["Heat", "heat "], 0).valid


def test_a_scorer_that_prefers_a_place_is_exposed() -> None:
    """It always takes what stands first."""
    presented_PRC = np.array([[[0, 1, 2]] * 2, [[2, 0, 1]] * 2, [[1, 2, 0]] * 2])
    target_R = np.array([0, 2])
    found = order_bias(-presented_PRC, presented_PRC, target_R)
    assert found["changed"].tolist() == [1.0, 1.0]
    assert found["HR@1"].tolist() == [0.5, 0.0, 0.5]
    thirds = {name: found[f"HR@1, {name} third"].tolist() for name in ("first", "middle", "last")}
    assert thirds == {"first": [1, 1], "middle": [0, 0], "last": [0, 0]}


def test_a_scorer_that_ignores_the_order_is_cleared() -> None:
    rng = np.random.default_rng(0)
    presented_PRC = rng.permuted(np.tile(np.arange(20), (5, 40, 1)), axis=2)
    scores_PRC = np.tile(rng.normal(size=(40, 20)), (5, 1, 1))
    target_R = scores_PRC[0].argmax(axis=1)
    found = order_bias(scores_PRC, presented_PRC, target_R)
    assert found["changed"].tolist() == [0.0] * 40
    assert found["HR@1"].tolist() == [1.0] * 5
    assert sum(len(found[f"HR@1, {t} third"]) for t in ("first", "middle", "last")) == 200
