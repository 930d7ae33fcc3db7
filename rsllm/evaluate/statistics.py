"""Intervals, paired tests, multiple comparisons and power, over users or users x training seeds.

Axes: R rows (users), S seeds of training, B bootstrap samples. All is seeded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rsllm.errors import EvaluationError
from rsllm.evaluate.metrics import Floats

SIGNIFICANCE = 0.05
CONFIDENCE = 1 - SIGNIFICANCE
RESAMPLES = 10_000
CHANCE_DRAWS = 100_000
POWER = 0.8
BATCH_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` users (and the seeds) with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two methods on the same users: mean of first minus second, and whether it is noise."""

    difference: Estimate
    p: float
    """Two-sided, not adjusted for other comparisons."""
    test: str
    minimum_detectable: float | None
    """Smallest true difference that this many users (and seeds) would show with 80 % power at the
    5 % level, were it the only comparison; None where all differences are equal, which tells
    nothing of their spread."""
    seeds: int = 1
    """Trainings of the method with more of them."""


def mean_interval(values: ArrayLike, seed: int = 0) -> Estimate:
    """Mean with a 95 % interval over users or, of [S, R] values, over users and seeds.

    Of one seed: Wilson's score interval (1927) for 0/1 values, else a bootstrap over users. Of
    several: a two-way bootstrap, crossed, since every seed meets the same users.

    Raises:
        EvaluationError: no values, or values that are not finite.
    """
    sample_SR = _checked(values)
    if not _binary(sample_SR):
        return _bootstrap(sample_SR, seed)
    hits, n = int(sample_SR.sum()), sample_SR.size
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(interval.low), float(interval.high), n)


def paired(a: ArrayLike, b: ArrayLike, seed: int = 0) -> PairedTest:
    """Compare two methods on the same users, seed by seed; one seed stands beside any number.

    The interval of the difference is that of `mean_interval`, never Wilson's. The p-value is
    McNemar's exact test if both are 0/1 and of one seed, otherwise a sign-flip permutation test of
    each user's mean over the seeds (all flips where they are few enough). It takes the seeds as
    they are; what their luck may do is in the interval.

    Raises:
        EvaluationError: other users or seeds, less than 2 users, or values that are not finite.
    """
    first, second = _checked(a), _checked(b)
    (seeds, n), (other_seeds, other_n) = first.shape, second.shape
    if n != other_n or n < 2 or (seeds != other_seeds and min(seeds, other_seeds) > 1):
        raise EvaluationError(
            f"cannot pair {n} with {other_n} users under {seeds} and {other_seeds} seeds; both"
            " methods need the same users, at least 2, and the same seeds"
        )
    difference_SR = first - second
    difference_R = difference_SR.mean(axis=0)
    binary = _binary(first) and _binary(second)
    error, freedom = _standard_error(difference_SR)
    quantiles = stats.t.ppf((1 - SIGNIFICANCE / 2, POWER), max(1.0, freedom))
    return PairedTest(
        difference=_bootstrap(difference_SR, seed),
        p=_mcnemar(difference_R) if binary else _sign_flip(difference_R, seed),
        test="exact McNemar" if binary else "sign-flip permutation",
        minimum_detectable=float(quantiles.sum() * error) if error > 1e-12 else None,
        seeds=len(difference_SR),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): keeps the chance of any false claim at the level."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(p) for p in adjusted]


def beats_chance(mrr: float, n: int, num_candidates: int, seed: int = 0) -> float:
    """One-sided p-value of an MRR over `n` rows against ranks uniform on 1..`num_candidates`.

    Monte Carlo with 100,000 draws, (k + 1) / (draws + 1), so it is never 0.

    Raises:
        EvaluationError: no rows, or an MRR outside (0, 1].
    """
    if n < 1 or not 0 < mrr <= 1:
        raise EvaluationError(f"an MRR of {mrr} over {n} rows cannot be tested")
    uniform = np.full(num_candidates, 1 / num_candidates)
    counts = np.random.default_rng(seed).multinomial(n, uniform, size=CHANCE_DRAWS)
    null = counts @ (1 / np.arange(1, num_candidates + 1))
    reached = int((null >= n * mrr - 1e-9).sum())
    return (reached + 1) / (CHANCE_DRAWS + 1)


def _checked(values: ArrayLike) -> Floats:
    """The values as [S, R]; one value per user is one seed's."""
    sample_SR = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if sample_SR.ndim != 2 or not sample_SR.size or not np.isfinite(sample_SR).all():
        raise EvaluationError(
            f"values of shape {np.shape(values)}; expected finite ones, one per user and seed"
        )
    return sample_SR


def _binary(sample_SR: Floats) -> bool:
    return len(sample_SR) == 1 and bool(np.isin(sample_SR, (0.0, 1.0)).all())


def _bootstrap(sample_SR: Floats, seed: int) -> Estimate:
    """Of one seed bias-corrected and accelerated (Efron 1987), of several two-way.

    The two-way bootstrap (McCullagh 2000; Owen 2007) gives the shape. Its spread is too small for
    few seeds and counts the interaction of users and seeds three times, so the width is that of
    the crossed random effects, with Student's quantile for their degrees of freedom.
    """
    value, n = float(sample_SR.mean()), sample_SR.shape[1]
    error, freedom = _standard_error(sample_SR)
    if error < 1e-12:
        return Estimate(value, value, value, n)
    if len(sample_SR) == 1:
        how = {"confidence_level": CONFIDENCE, "method": "BCa", **_resampling(n, seed)}
        low, high = stats.bootstrap(sample_SR, np.mean, **how).confidence_interval
    else:
        mean_B, tail = _two_way_means(sample_SR, seed), SIGNIFICANCE / 2
        wider = error / mean_B.std() * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
        ends = value + wider * (np.quantile(mean_B, (tail, 1 - tail)) - value)
        low, high = ends.clip(sample_SR.min(), sample_SR.max())
    return Estimate(value, float(low), float(high), n)


def _two_way_means(sample_SR: Floats, seed: int) -> Floats:
    """Means [B] of samples in which users and seeds are drawn anew, each with replacement."""
    (num_seeds, n), rng = sample_SR.shape, np.random.default_rng(seed)
    batch, means = _resampling(n, seed)["batch"], []
    for size in [batch] * (RESAMPLES // batch) + [RESAMPLES % batch]:
        user_BR = sample_SR[rng.integers(num_seeds, size=(size, num_seeds))].mean(axis=1)
        means.append(np.take_along_axis(user_BR, rng.integers(n, size=(size, n)), axis=1).mean(1))
    return np.concatenate(means)


def _standard_error(sample_SR: Floats) -> tuple[float, float]:
    """Of the mean under crossed random effects of users and seeds, with degrees of freedom.

    Unbiased in its square, but never below what users or seeds alone make; Satterthwaite (1946).
    """
    (seeds, n), mean = sample_SR.shape, sample_SR.mean()
    user_R, seed_S1 = sample_SR.mean(axis=0), sample_SR.mean(axis=1, keepdims=True)
    free_R, free_S = max(1, n - 1), max(1, seeds - 1)
    by_user = ((user_R - mean) ** 2).sum() / free_R / n
    by_seed = ((seed_S1 - mean) ** 2).sum() / free_S / seeds
    by_both = ((sample_SR - user_R - seed_S1 + mean) ** 2).sum() / (free_R * free_S * seeds * n)
    variance = max(by_user, by_seed, by_user + by_seed - by_both)
    spread = by_user**2 / free_R + by_seed**2 / free_S
    return math.sqrt(variance), float(variance**2 / max(spread, np.finfo(float).tiny))


def _mcnemar(difference: Floats) -> float:
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _sign_flip(difference: Floats, seed: int) -> float:
    moved = difference[difference != 0]  # a zero keeps its value under every flip
    if len(moved) < 2:
        return 1.0
    how = _resampling(len(moved), seed)
    return float(stats.permutation_test((moved,), np.sum, permutation_type="samples", **how).pvalue)


def _resampling(n: int, seed: int) -> dict[str, Any]:
    """How scipy resamples `n` values: how often, how many samples at once, from which seed."""
    batch = max(1, BATCH_BYTES // (8 * n))
    return {"n_resamples": RESAMPLES, "batch": batch, "rng": np.random.default_rng(seed)}
