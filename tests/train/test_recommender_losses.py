"""The three losses against loops over single scores, and what the sampled one estimates."""

# Axes: B rows, N negatives, I items of the catalogue.
from __future__ import annotations

from collections.abc import Callable
from math import exp, log

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rsllm.train.recommender import binary, sampled_softmax

STEP = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def slopes(value: Callable[[Tensor], float], at: Tensor) -> Tensor:
    """The gradient by central differences, entry by entry."""
    slope = torch.zeros_like(at)
    for place in np.ndindex(*at.shape):
        shift = torch.zeros_like(at)
        shift[place] = STEP
        slope[place] = (value(at + shift) - value(at - shift)) / (2 * STEP)
    return slope


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    live = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(live), live)
    return slope


def assert_equal_functions(
    loss: Callable[[Tensor], Tensor], naive: Callable[[Tensor], float], at: Tensor
) -> None:
    assert float(loss(at)) == pytest.approx(naive(at), abs=1e-12)
    torch.testing.assert_close(gradient(loss, at), slopes(naive, at), atol=1e-8, rtol=0)


def naive_sampled(scores_BX: Tensor, expected_BN: Tensor) -> float:
    total = 0.0
    for (target, *negatives), expected in zip(
        scores_BX.tolist(), expected_BN.tolist(), strict=True
    ):
        others = sum(exp(s) / times for s, times in zip(negatives, expected, strict=True))
        total -= log(exp(target) / (exp(target) + others))
    return total / len(scores_BX)


def sampled(scores_BX: Tensor, expected_BN: Tensor) -> Tensor:
    """The target's score stands in column 0."""
    return sampled_softmax(scores_BX[:, 0], scores_BX[:, 1:], expected_BN)


def test_sampled_softmax_equals_a_loop() -> None:
    expected_BN = random(4, 5, seed=1).exp()
    assert_equal_functions(
        lambda at: sampled(at, expected_BN),
        lambda at: naive_sampled(at, expected_BN),
        random(4, 6),
    )


def test_binary_equals_a_loop() -> None:
    def naive(scores_BX: Tensor) -> float:
        total = 0.0
        for target, *negatives in scores_BX.tolist():
            for negative in negatives:
                total -= log(1 / (1 + exp(-target))) + log(1 - 1 / (1 + exp(-negative)))
        return total / scores_BX[:, 1:].numel()

    assert_equal_functions(lambda at: binary(at[:, 0], at[:, 1:]), naive, random(4, 6))


def test_every_other_item_once_is_the_whole_softmax() -> None:
    scores_BI, first_B = random(5, 9), torch.zeros(5, dtype=torch.long)
    once_BN = torch.ones(5, 8, dtype=torch.double)
    torch.testing.assert_close(
        sampled(scores_BI, once_BN), F.cross_entropy(scores_BI, first_B), atol=1e-14, rtol=0
    )
    torch.testing.assert_close(
        gradient(lambda at: sampled(at, once_BN), scores_BI),
        gradient(lambda at: F.cross_entropy(at, first_B), scores_BI),
        atol=1e-14,
        rtol=0,
    )


def test_an_infinite_expectation_takes_a_negative_out() -> None:
    scores_BX, expected_BN = random(4, 6), random(4, 5, seed=1).exp()
    expected_BN[:, 2] = torch.inf
    kept = [0, 1, 2, 4, 5]
    left_BN = expected_BN[:, [0, 1, 3, 4]]
    assert torch.equal(sampled(scores_BX, expected_BN), sampled(scores_BX[:, kept], left_BN))
    slope_BX = gradient(lambda at: sampled(at, expected_BN), scores_BX)
    assert not slope_BX[:, 3].any()
    assert torch.equal(
        slope_BX[:, kept], gradient(lambda at: sampled(at, left_BN), scores_BX[:, kept])
    )


def test_the_sampled_sum_is_unbiased() -> None:
    """Item 0 is the target; what drawing it counts for is taken out."""
    rng, draws, num_negatives = np.random.default_rng(0), 3000, 5
    scores_I = random(12, seed=3)
    share_I = rng.dirichlet(np.full(12, 2.0))
    drawn_DN = rng.choice(12, (draws, num_negatives), p=share_I)
    expected_DN = torch.from_numpy(np.where(drawn_DN, num_negatives * share_I[drawn_DN], np.inf))
    found = [
        exp(sampled_softmax(scores_I[:1], scores_I[drawn_N][None], expected_N[None]) + scores_I[0])
        for drawn_N, expected_N in zip(torch.from_numpy(drawn_DN), expected_DN, strict=True)
    ]
    error = np.std(found) / draws**0.5
    exact = float(scores_I.exp().sum())
    assert error < 0.05 * exact
    assert np.mean(found) == pytest.approx(exact, abs=4 * error)
