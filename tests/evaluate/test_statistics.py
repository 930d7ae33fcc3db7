from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rsllm.errors import EvaluationError
from rsllm.evaluate import statistics
from rsllm.evaluate.statistics import (
    Estimate,
    _standard_error,
    _two_way_means,
    beats_chance,
    holm,
    mean_interval,
    paired,
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


@pytest.mark.parametrize(
    "values", [[], [[]], [0.1, np.nan], [[0.1, np.inf], [1.0, 2.0]], [[[1.0]]]]
)
def test_unusable_values_are_refused(values: Any) -> None:
    with pytest.raises(EvaluationError):
        mean_interval(values)


def crossed(rng: Any, num_seeds: int, n: int, spreads: tuple[float, float, float]) -> np.ndarray:
    """Values [S, R] of mean 0: an effect of each user (skewed), of each seed, and of both."""
    users, seeds, both = spreads
    user_R = users * (rng.exponential(size=n) - 1)
    seed_S1 = seeds * rng.normal(size=(num_seeds, 1))
    return np.asarray(user_R + seed_S1 + both * rng.normal(size=(num_seeds, n)))


def test_two_way_means_equal_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 25)
    sample_SR = np.random.default_rng(8).normal(size=(3, 7))
    found = _two_way_means(sample_SR, seed=4)
    rng = np.random.default_rng(4)
    seeds_BS, users_BR = rng.integers(3, size=(25, 3)), rng.integers(7, size=(25, 7))
    expected = []
    for seeds, users in zip(seeds_BS, users_BR, strict=True):
        total = 0.0
        for seed in seeds:
            for user in users:
                total += sample_SR[seed, user]
        expected.append(total / 21)
    assert found == pytest.approx(expected)
    monkeypatch.setattr(statistics, "BATCH_BYTES", 8 * 7 * 10)
    assert len(_two_way_means(sample_SR, seed=4)) == 25, "in parts of ten"


def test_spread_of_two_way_means_has_its_closed_form() -> None:
    """Users, seeds and what is left of both, each with its own share (Owen 2007)."""
    num_seeds, n = 4, 30
    sample_SR = crossed(np.random.default_rng(9), num_seeds, n, (1.0, 0.4, 0.8))
    user_R, seed_S = sample_SR.mean(axis=0), sample_SR.mean(axis=1)
    rest_SR = sample_SR - user_R - seed_S[:, None] + sample_SR.mean()
    expected = user_R.var() / n + seed_S.var() / num_seeds + rest_SR.var() / (n * num_seeds)
    assert _two_way_means(sample_SR, seed=0).var() == pytest.approx(expected, rel=0.06)


def test_standard_error_is_that_of_crossed_random_effects() -> None:
    num_seeds, n, spreads = 5, 40, (1.0, 0.5, 2.0)
    rng = np.random.default_rng(10)
    samples = [crossed(rng, num_seeds, n, spreads) for _ in range(3000)]
    users, seeds, both = (spread**2 for spread in spreads)
    variance = users / n + seeds / num_seeds + both / (n * num_seeds)
    assert np.var([sample.mean() for sample in samples]) == pytest.approx(variance, rel=0.1)
    squares = [_standard_error(sample)[0] ** 2 for sample in samples]
    assert np.mean(squares) == pytest.approx(variance, rel=0.05)
    values = samples[0][0]
    error, freedom = _standard_error(values[None])
    assert (error, freedom) == pytest.approx((values.std(ddof=1) / n**0.5, n - 1)), "of one seed"


@pytest.mark.parametrize(
    ("num_seeds", "spreads"),
    [
        (2, (1.0, 0.0, 0.5)),
        (3, (1.0, 0.1, 1.0)),
        (3, (1.0, 0.3, 0.5)),
        (3, (0.3, 0.5, 0.3)),
        (5, (1.0, 0.0, 2.0)),
        (5, (0.3, 0.3, 0.3)),
    ],
)
def test_intervals_over_users_and_seeds_cover_the_truth(
    num_seeds: int, spreads: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(11)
    samples = [crossed(rng, num_seeds, 60, spreads) for _ in range(500)]
    found = [mean_interval(sample, seed=number) for number, sample in enumerate(samples)]
    assert 0.91 <= np.mean([interval.low <= 0 <= interval.high for interval in found]) <= 0.985


def test_more_seeds_tell_more_and_users_alone_too_much() -> None:
    """Where seeds differ, an interval over users of their means is too narrow."""
    sample_SR = crossed(np.random.default_rng(12), 6, 200, (0.3, 0.5, 0.3))
    few, many = mean_interval(sample_SR[:3]), mean_interval(sample_SR)
    users_alone = mean_interval(sample_SR.mean(axis=0))
    widths = [interval.high - interval.low for interval in (few, many, users_alone)]
    assert widths[0] > widths[1] > 2 * widths[2]
    assert few.n == 200
    assert few.value == pytest.approx(sample_SR[:3].mean())


def test_one_seed_is_no_other_than_its_users() -> None:
    values = np.random.default_rng(13).random((2, 20))
    assert mean_interval(values[:1]) == mean_interval(values[0])
    assert paired(values[:1], values[1:]) == paired(values[0], values[1])
    hits = zeros_and_ones(7, 20)
    assert mean_interval(hits[None]) == mean_interval(hits)
    repeated = mean_interval(np.stack([hits, hits]))
    assert repeated != mean_interval(hits), "Wilson's is for one seed"
    assert 0 <= repeated.low < 0.35 < repeated.high <= 1


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


def test_seeds_are_averaged_before_the_flips() -> None:
    rng = np.random.default_rng(14)
    first_SR, second_SR = rng.random((3, 8)) + 0.2, rng.random((3, 8))
    for other_SR in (second_SR, second_SR[:1]):  # one seed stands beside all
        difference_R = first_SR.mean(axis=0) - other_SR.mean(axis=0)
        flips = np.array(list(product([1, -1], repeat=8))) @ difference_R
        result = paired(first_SR, other_SR)
        assert result.p == pytest.approx(np.mean(np.abs(flips) >= abs(difference_R.sum()) - 1e-12))
        assert result.difference == mean_interval(first_SR - other_SR)
        error, freedom = _standard_error(first_SR - other_SR)
        quantiles = stats.t.ppf([0.975, 0.8], freedom)
        assert result.minimum_detectable == pytest.approx(quantiles.sum() * error)


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
    assert detectable is not None
    assert detectable == pytest.approx(2.8016 * spread / n**0.5, rel=0.1)
    samples = rng.normal(detectable, spread, size=(4000, n))
    found = np.abs(samples.mean(1)) > 1.96 * samples.std(1, ddof=1) / n**0.5
    assert found.mean() == pytest.approx(0.8, abs=0.08)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_difference_that_is_called_detectable_shows_in_its_interval(seeds: int) -> None:
    """Few seeds make wide intervals, so what they could have shown is more as well."""
    rng = np.random.default_rng(7)
    above = 0
    for shift in np.repeat([0.1, 0.3, 0.6], 20):
        luck_S1 = rng.normal(0, 0.05, (seeds, 1))
        found = paired(shift + luck_S1 + rng.normal(0, 0.3, (seeds, 60)), np.zeros((seeds, 60)))
        assert found.minimum_detectable is not None
        if found.difference.value > found.minimum_detectable:
            above += 1
            assert found.difference.low > 0
    assert above > 20


def test_pairs_need_the_same_users() -> None:
    with pytest.raises(EvaluationError, match="3 with 2"):
        paired([1, 0, 1], [1, 0])
    with pytest.raises(EvaluationError, match="at least 2"):
        paired([1], [0])
    with pytest.raises(EvaluationError, match="under 2 and 3 seeds"):
        paired(np.ones((2, 4)), np.zeros((3, 4)))


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


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_outcomes_say_nothing_of_what_would_have_shown(seeds: int) -> None:
    values_SR = np.random.default_rng(1).random((seeds, 40))
    test = paired(values_SR, values_SR)
    assert (test.minimum_detectable, test.p, test.seeds) == (None, 1.0, seeds)
    assert paired(values_SR, values_SR[:1] + 0.5).seeds == seeds
