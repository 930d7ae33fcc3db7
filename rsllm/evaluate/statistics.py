"""Intervals, paired tests, multiple comparisons and power, all over users and all seeded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

VerdictText = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` users with its 95 % interval."""

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
    minimum_detectable: float
    """Smallest true difference this many users would show with 80 % power at the 5 % level."""


def mean_interval(values: ArrayLike, seed: int = 0) -> Estimate:
    """Mean with a 95 % interval: Wilson's score interval (1927) for 0/1 values, else a bootstrap.

    Raises:
        EvaluationError: no values, or values that are not finite.
    """
    sample = _checked(values)
    if not _binary(sample):
        return _bootstrap(sample, seed)
    hits, n = int(sample.sum()), len(sample)
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(interval.low), float(interval.high), n)


def paired(a: ArrayLike, b: ArrayLike, seed: int = 0) -> PairedTest:
    """Compare two methods on the same users.

    The interval of the difference is a paired bootstrap. The p-value is McNemar's exact test if
    both are 0/1, otherwise a sign-flip permutation test (all flips where they are few enough).

    Raises:
        EvaluationError: vectors of unequal length, shorter than 2, or not finite.
    """
    first, second = _checked(a), _checked(b)
    n, other = len(first), len(second)
    if n != other or n < 2:
        raise EvaluationError(f"cannot pair {n} with {other} users; give the same, at least 2")
    difference = first - second
    binary = _binary(first) and _binary(second)
    return PairedTest(
        difference=_bootstrap(difference, seed),
        p=_mcnemar(difference) if binary else _sign_flip(difference, seed),
        test="exact McNemar" if binary else "sign-flip permutation",
        minimum_detectable=_minimum_detectable(difference),
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


def verdict_text(test: PairedTest, adjusted_p: float) -> VerdictText:
    """What may be said of the first method at the 5 % level, after adjustment."""
    if adjusted_p >= SIGNIFICANCE:
        return "not distinguishable"
    return "better" if test.difference.value > 0 else "worse"


def _checked(values: ArrayLike) -> Floats:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size:
        raise EvaluationError(f"values of shape {sample.shape}; expected one value per user")
    broken = np.flatnonzero(~np.isfinite(sample))
    if broken.size:
        raise EvaluationError(f"the value of user {broken[0]} is {sample[broken[0]]}")
    return sample


def _binary(sample: Floats) -> bool:
    return bool(np.isin(sample, (0.0, 1.0)).all())


def _bootstrap(sample: Floats, seed: int) -> Estimate:
    """Bias-corrected and accelerated bootstrap of the mean (Efron 1987)."""
    value, n = float(sample.mean()), len(sample)
    if np.ptp(sample) < 1e-12:
        return Estimate(value, value, value, n)
    how = _resampling(n, seed)
    found = stats.bootstrap((sample,), np.mean, confidence_level=CONFIDENCE, method="BCa", **how)
    low, high = found.confidence_interval
    return Estimate(value, float(low), float(high), n)


def _mcnemar(difference: Floats) -> float:
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _sign_flip(difference: Floats, seed: int) -> float:
    moved = difference[difference != 0]  # a zero keeps its value under every flip
    if len(moved) < 2:
        return 1.0
    how = _resampling(len(moved), seed)
    return float(stats.permutation_test((moved,), np.sum, permutation_type="samples", **how).pvalue)


def _minimum_detectable(difference: Floats) -> float:
    quantiles = stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(POWER)
    return float(quantiles * difference.std(ddof=1) / math.sqrt(len(difference)))


def _resampling(n: int, seed: int) -> dict[str, Any]:
    """How scipy resamples `n` values: how often, how many samples at once, from which seed."""
    batch = max(1, BATCH_BYTES // (8 * n))
    return {"n_resamples": RESAMPLES, "batch": batch, "rng": np.random.default_rng(seed)}
