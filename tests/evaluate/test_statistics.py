from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from rsllm.errors import EvaluationError
from rsllm.evaluate.statistics import (
    Estimate,
    PairedTest,
    beats_chance,
    holm,
    mean_interval,
    paired,
    verdict_text,
)


def zeros_and_ones(ones: int, n: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [ones, n - ones])


def test_wilson_equals_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611)}
    for (hits, n), interval in published.items():
        estimate = mean_interval(zeros_and_ones(hits, n))  # 0/1 values choose Wilson
        assert (estimate.value, estimate.n) == (hits / n, n)
        assert (estimate.low, estimate.high) == pytest.approx(interval, abs=6e-5)


def test_bootstrap_nears_the_t_interval_on_normal_values() -> None:
    values = np.random.default_rng(2).normal(3.0, 1.0, size=400)
    estimate = mean_interval(values, seed=1)
    half = 1.96593 * values.std(ddof=1) / 20  # t quantile, 399 degrees of freedom
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.006)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.006)
    assert estimate == mean_interval(values, seed=1)


def test_bootstrap_covers_the_mean_of_skewed_reciprocal_ranks() -> None:
    rng = np.random.default_rng(3)
    truth = (1 / np.arange(1, 21)).mean()
    estimates = [mean_interval(1 / rng.integers(1, 21, size=95), seed=s) for s in range(200)]
    covered = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    assert 0.91 <= covered <= 0.99


def test_constant_values_have_a_point_interval() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == Estimate(0.5, 0.5, 0.5, 3)
    almost = mean_interval([0.1, 0.1, 0.1 + 1e-17])  # no interval of NaN from rounding
    assert almost.low == almost.value == almost.high


@pytest.mark.parametrize("values", [[], [0.1, np.nan], [[1.0]]])
def test_unusable_values_are_refused(values: list[float]) -> None:
    with pytest.raises(EvaluationError):
        mean_interval(values)


def test_mcnemar_by_hand() -> None:
    first = [1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    second = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    result = paired(first, second)  # 6 wins, 1 loss: 2 (1 + 7) / 2^7
    assert result.test == "exact McNemar"
    assert result.p == pytest.approx(16 / 128)
    assert result.difference.value == pytest.approx(0.5)
    assert result.difference.low <= 0.5 <= result.difference.high
    assert paired(first, first).p == 1.0


def test_sign_flip_equals_enumeration() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.random(9) + 0.25, rng.random(9)
    second[0] = first[0]
    difference = first - second
    flips = np.array(list(product([1, -1], repeat=9))) @ difference
    expected = np.mean(np.abs(flips) >= abs(difference.sum()) - 1e-12)
    result = paired(first, second)
    assert result.test == "sign-flip permutation"
    assert result.p == pytest.approx(expected)
    assert paired(second, first).p == pytest.approx(expected)


def test_sign_flip_keeps_its_level_and_is_seeded() -> None:
    rng = np.random.default_rng(5)
    pairs = [1 / rng.integers(1, 21, size=(2, 60)) for _ in range(60)]
    p_values = [paired(a, b).p for a, b in pairs]
    assert np.mean(np.array(p_values) < 0.05) <= 0.13
    assert p_values[0] == paired(*pairs[0]).p


def test_minimum_detectable_difference_has_the_stated_power() -> None:
    rng = np.random.default_rng(6)
    n, spread = 300, 0.5
    detectable = paired(rng.normal(0, spread, n), np.zeros(n)).minimum_detectable
    assert detectable == pytest.approx(2.8016 * spread / n**0.5, rel=0.1)
    samples = rng.normal(detectable, spread, size=(4000, n))
    found = np.abs(samples.mean(1)) > 1.96 * samples.std(1, ddof=1) / n**0.5
    assert found.mean() == pytest.approx(0.8, abs=0.08)


def test_pairs_need_the_same_users() -> None:
    with pytest.raises(EvaluationError, match="3 with 2"):
        paired([1, 0, 1], [1, 0])
    with pytest.raises(EvaluationError, match="at least 2"):
        paired([1], [0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_beats_chance_equals_enumeration() -> None:
    null = np.array([sum(1 / r for r in ranks) for ranks in product(range(1, 6), repeat=4)])
    for ranks in ([1, 2, 3, 1], [5, 5, 5, 5], [2, 2, 4, 1]):
        exact = np.mean(null >= sum(1 / r for r in ranks) - 1e-12)
        mrr = float(np.mean([1 / r for r in ranks]))
        assert beats_chance(mrr, 4, 5) == pytest.approx(exact, abs=0.006)


def test_beats_chance_is_never_zero_and_checks_its_input() -> None:
    assert beats_chance(1.0, 50, 20) == pytest.approx(1 / 100_001)
    with pytest.raises(EvaluationError, match="0 rows"):
        beats_chance(0.5, 0, 20)


@pytest.mark.parametrize(
    ("difference", "p", "text"),
    [
        (0.1, 0.01, "better"),
        (-0.1, 0.01, "worse"),
        (0.1, 0.05, "not distinguishable"),
        (-0.1, 0.5, "not distinguishable"),
    ],
)
def test_verdict_text(difference: float, p: float, text: str) -> None:
    estimate = Estimate(difference, difference - 0.05, difference + 0.05, 100)
    assert verdict_text(PairedTest(estimate, 0.001, "exact McNemar", 0.05), p) == text
