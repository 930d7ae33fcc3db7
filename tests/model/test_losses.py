"""Losses against naive float64 loops, gradients included."""

# Axes: B rows, M rows of all workers, T tokens, D width, N labels, K candidates.
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import TITLES, make_batch, make_encoder, make_rows
from torch import Tensor

from rsllm.model.backbone import load_tokenizer
from rsllm.model.branches import branch_scores
from rsllm.model.hybrid import pool
from rsllm.model.losses import (
    contrast,
    distinct_targets,
    negatives,
    next_item_loss,
    ranking_loss,
)
from rsllm.prompts.collate import Row


def naive_contrast(
    anchors_MD: Tensor, others_MD: Tensor, negative_MM: Tensor, temperature: float, symmetric: bool
) -> Tensor:
    losses = []
    for i in range(len(anchors_MD)):
        pairs = [(i, j) for j in range(len(others_MD)) if j == i or negative_MM[i, j]]
        losses.append(naive_term(anchors_MD, others_MD, pairs, i, temperature))
        if symmetric:
            pairs = [(j, i) for j in range(len(anchors_MD)) if j == i or negative_MM[j, i]]
            losses.append(naive_term(anchors_MD, others_MD, pairs, i, temperature))
    return torch.stack(losses).mean()


def naive_term(
    anchors_MD: Tensor,
    others_MD: Tensor,
    pairs: list[tuple[int, int]],
    own: int,
    temperature: float,
) -> Tensor:
    """-log softmax of (own, own) among pairs of an anchor and another."""
    similar = {(i, j): cosine(others_MD[j], anchors_MD[i]) / temperature for i, j in pairs}
    highest = max(s.item() for s in similar.values())
    partition = sum((s - highest).exp() for s in similar.values())
    return torch.log(torch.as_tensor(partition)) + highest - similar[own, own]


def as_doubles(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 leaves of the same values."""
    return a.detach().double().requires_grad_(), b.detach().double().requires_grad_()


def cosine(a_D: Tensor, b_D: Tensor) -> Tensor:
    return (a_D * b_D).sum() / ((a_D * a_D).sum().sqrt() * (b_D * b_D).sum().sqrt())


@pytest.mark.parametrize(
    ("temperature", "norm", "tolerance"), [(0.1, 1.0, 2e-6), (0.01, 1e4, 1e-4), (2.0, 1e-3, 2e-6)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_contrast_equals_the_double_loop(
    temperature: float, norm: float, tolerance: float, symmetric: bool
) -> None:
    torch.manual_seed(0)
    anchors_MD, others_MD = norm * torch.randn(9, 5), norm * torch.randn(9, 5)
    negative_MM = (torch.rand(9, 9) < 0.6).fill_diagonal_(False)
    assert not torch.equal(negative_MM, negative_MM.T)
    inputs = anchors_MD.requires_grad_(), others_MD.requires_grad_()
    doubles = as_doubles(*inputs)
    loss = contrast(*inputs, negative_MM, temperature, symmetric=symmetric).loss
    expected = naive_contrast(*doubles, negative_MM, temperature, symmetric)
    assert float(loss) == pytest.approx(float(expected), rel=tolerance, abs=tolerance)
    ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, doubles)
    for own, reference in zip(ours, theirs, strict=True):
        largest = float(reference.abs().max())
        torch.testing.assert_close(
            own.double(), reference, atol=10 * tolerance * largest, rtol=tolerance
        )


def test_contrast_survives_half_precision_vectors() -> None:
    torch.manual_seed(0)
    targets_BD, vectors_BD = 1e4 * torch.randn(6, 5), 1e4 * torch.randn(6, 5)
    halves = targets_BD.bfloat16(), vectors_BD.bfloat16()
    negative_BM = ~torch.eye(6).bool()
    loss = contrast(*halves, negative_BM, 0.01).loss
    expected = naive_contrast(*as_doubles(*halves), negative_BM, 0.01, symmetric=False)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_rows_without_negatives_add_nothing(num_rows: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    targets_BD = torch.randn(num_rows, 5, requires_grad=True)
    vectors_BD = torch.randn(num_rows, 5, requires_grad=True)
    nothing_BM = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    part = contrast(targets_BD, vectors_BD, nothing_BM, 0.01, symmetric=symmetric)
    assert float(part.loss) == 0
    assert float(part.num_negatives) == 0
    assert float(part.cosine) == 0
    torch.autograd.backward(part.loss)
    for leaf in (targets_BD, vectors_BD):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_contrast_reports_what_it_sees() -> None:
    """Three orthogonal pairs, the last swapped onto the first."""
    targets_BD = torch.eye(3)
    vectors_BD = torch.eye(3)[[0, 1, 0]]
    negative_BM = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).bool()
    part = contrast(targets_BD, vectors_BD, negative_BM, 1.0)
    assert float(part.num_negatives) == pytest.approx(4 / 3)
    assert float(part.cosine) == 0
    own_and_negatives = [(1, [0]), (1, [0, 0]), (0, [0])]
    expected = [
        -own + math.log(sum(math.exp(s) for s in [own, *rivals]))
        for own, rivals in own_and_negatives
    ]
    assert float(part.loss) == pytest.approx(sum(expected) / 3)
    assert float(part.accuracy) >= 2 / 3


@pytest.mark.parametrize("num_rows", [1, 12])
def test_negatives_equal_their_definition(random_llm: Path, num_rows: int) -> None:
    rows = make_rows(num_rows, seed=5)
    encoder = make_encoder(load_tokenizer(random_llm), "text")
    parts = [part for part in (rows[:5], rows[5:]) if part]
    tt_BM, ut_BM = negatives([make_batch(encoder, part, all_branches=False) for part in parts])
    assert tt_BM.tolist() == [[is_negative(i, j) for j in rows] for i in rows]
    assert ut_BM.tolist() == [
        [is_negative(i, j) and not was_seen(i, j) for j in rows] for i in rows
    ]
    if num_rows > 1:
        assert ut_BM.sum() < tt_BM.sum() < num_rows * (num_rows - 1)


def is_negative(i: Row, j: Row) -> bool:
    return TITLES[i.target] != TITLES[j.target] and i.user != j.user


def was_seen(i: Row, j: Row) -> bool:
    return TITLES[i.target] in {TITLES[item] for item in j.history}


def test_each_target_with_a_vector_is_aligned_once(random_llm: Path) -> None:
    """Two items titled Heat are two targets, and no negatives of each other."""
    rows = [
        Row(history=[2], candidates=[target], target=target, user=user, table=table)
        for user, (target, table) in enumerate([(4, 0), (1, 0), (4, 0), (0, 0), (8, 0), (1, 1)])
    ]
    encoder = make_encoder(load_tokenizer(random_llm), "unified")
    items_IE = torch.ones(2 * len(TITLES), 3)
    items_IE[8] = 0
    batches = [make_batch(encoder, part) for part in (rows[:3], rows[3:])]
    rows_G, other_GG = distinct_targets(batches, items_IE)
    assert rows_G.tolist() == [0, 1, 3, 5]
    titles = [TITLES[rows[row].target] for row in rows_G]
    assert other_GG.tolist() == [[i != j for j in titles] for i in titles]


def test_next_item_loss_is_the_mean_over_tokens() -> None:
    logp_N = torch.tensor([-1.0, -2.0, -4.5])
    assert float(next_item_loss(logp_N, 3.0)) == pytest.approx(2.5)


def test_ranking_loss_equals_the_naive_loop() -> None:
    torch.manual_seed(0)
    scores_BK = (30 * torch.randn(5, 7)).requires_grad_()
    target_B = torch.tensor([0, 6, 2, 2, 5])
    doubles = scores_BK.detach().double().requires_grad_()
    naive = [
        torch.logsumexp(row, 0) - row[target]
        for row, target in zip(doubles, target_B.tolist(), strict=True)
    ]
    loss, expected = ranking_loss(scores_BK, target_B), torch.stack(naive).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    (own,), (reference,) = (
        torch.autograd.grad(value, [leaf])
        for value, leaf in ((loss, scores_BK), (expected, doubles))
    )
    torch.testing.assert_close(own.double(), reference, atol=1e-6, rtol=1e-5)


def test_branch_scores_equal_the_naive_loop(random_llm: Path) -> None:
    rows = make_rows(3)
    batch = make_batch(make_encoder(load_tokenizer(random_llm), "text"), rows)
    logp_N = torch.randn(len(batch.label_N), generator=torch.Generator().manual_seed(0))
    expected = [[0.0] * 4 for _ in rows]
    for value, branch in zip(logp_N.tolist(), batch.label_branch_N.tolist(), strict=True):
        expected[branch // 4][branch % 4] += value
    torch.testing.assert_close(branch_scores(logp_N, batch), torch.tensor(expected))


@pytest.mark.parametrize("cast", [Tensor.float, Tensor.bfloat16])
def test_pool_equals_the_naive_loop(cast: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    states_BTD = cast(1e3 * torch.randn(3, 6, 4))
    spans = [(0, 1), (2, 6), (1, 4)]
    span_BT = torch.tensor([[start <= t < end for t in range(6)] for start, end in spans])
    naive = [
        sum(states_BTD[row, t].double() for t in range(*span)) / (span[1] - span[0])
        for row, span in enumerate(spans)
    ]
    pooled_BD = pool(states_BTD, span_BT)
    assert pooled_BD.dtype == torch.float32
    expected_BD = torch.stack([torch.as_tensor(row) for row in naive])
    torch.testing.assert_close(pooled_BD.double(), expected_BD, atol=1e-3, rtol=1e-5)
