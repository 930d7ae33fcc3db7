"""RSLLM's losses, and the ranking loss that is ours.

L = (1 - alpha - beta) L_NIP + alpha L_TT + beta L_UT + gamma L_rank. RSLLM (arXiv 2412.16933)
names one language-model and two InfoNCE-like losses; their exact form is reconstructed from CALRec
(arXiv 2405.02429). L_rank is an extension; gamma = 0 is the paper.

Axes: B own rows, M rows of all workers, D language-model width, K candidates, H history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rsllm.prompts.collate import Batch


def next_item_loss(logp_N: Tensor, tokens_per_batch: float) -> Tensor:
    """L_NIP: negative log-likelihood of the answer tokens.

    Args:
        tokens_per_batch: answer tokens of the global batch / number of micro-batches it is split
            into, so that the average over micro-batches and workers is the mean over tokens.
    """
    return -logp_N.sum() / tokens_per_batch


def ranking_loss(scores_BK: Tensor, target_B: Tensor) -> Tensor:
    """L_rank (ours): cross-entropy of the target among its row's candidates."""
    return F.cross_entropy(scores_BK.float(), target_B)


@dataclass(frozen=True, slots=True)
class Contrast:
    """One contrastive loss and what tells whether it has leverage."""

    loss: Tensor
    accuracy: Tensor
    """Share of rows whose own vector is the nearest to their target's."""
    cosine: Tensor
    """Mean cosine with the negatives."""
    num_negatives: Tensor
    """Mean number of negatives per row."""


def contrast(
    targets_BD: Tensor, vectors_MD: Tensor, own_B: Tensor, negative_BM: Tensor, temperature: float
) -> Contrast:
    """-log softmax over {own} and negatives of cos(vector_j, target_i) / temperature, mean over i.

    Args:
        targets_BD: v^T_i, the target item on its own.
        vectors_MD: v^{T|U}_j (L_TT) or v^U_j (L_UT) of every row of every worker.
        own_B: place of row i among the M rows.
        negative_BM: True where row j may serve as a negative of row i.

    A row without negatives adds 0.
    """
    cosine_BM = F.normalize(targets_BD.float(), dim=-1) @ F.normalize(vectors_MD.float(), dim=-1).T
    own_BM = F.one_hot(own_B, cosine_BM.shape[1]).bool()
    logits_BM = (cosine_BM / temperature).masked_fill(~(negative_BM | own_BM), -torch.inf)
    with torch.no_grad():
        num_negatives = negative_BM.sum()
        off_diagonal = (cosine_BM * negative_BM).sum() / num_negatives.clamp(min=1)
        accuracy = (logits_BM.argmax(1) == own_B).float().mean()
    loss = F.cross_entropy(logits_BM, own_B)
    return Contrast(loss, accuracy, off_diagonal, num_negatives / len(own_B))


def false_negatives(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The sets B(i) of both contrasts over the rows of all workers.

    Row j is a negative of row i if its target has another title and its user is another; for L_UT
    also if target i is not in history j. All rows of a batch are of one domain.

    Returns:
        own_B, negatives_tt_BM, negatives_ut_BM.
    """
    title_M, user_M = _gather_rows(batch.title_B), _gather_rows(batch.user_B)
    seen_BM = _seen_in(batch)
    differs_BM = (batch.title_B[:, None] != title_M) & (batch.user_B[:, None] != user_M)
    first = _rank() * len(batch.user_B)
    own_B = torch.arange(first, first + len(batch.user_B), device=user_M.device)
    return own_B, differs_BM, differs_BM & ~seen_BM


def _seen_in(batch: Batch) -> Tensor:
    """True where the target of own row i stands in the history of row j. [B, M]."""
    past = batch.past_BH
    if _world() > 1:
        widest = torch.tensor(past.shape[1], device=past.device)
        dist.all_reduce(widest, op=dist.ReduceOp.MAX)
        past = F.pad(past, (0, int(widest) - past.shape[1]), value=-1)
    past_MH = _gather_rows(past)
    return (batch.title_B[:, None, None] == past_MH).any(-1)


class _GatherWithGradient(torch.autograd.Function):
    """Rows of all workers; the backward pass adds up what every worker sends back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        own = len(gradient) // _world()
        return gradient[_rank() * own : (_rank() + 1) * own]


def gather(rows_BD: Tensor) -> Tensor:
    """The rows of all workers, in rank order, differentiable. [M, D]."""
    if _world() == 1:
        return rows_BD
    gathered: Tensor = _GatherWithGradient.apply(rows_BD)  # type: ignore[no-untyped-call]
    return gathered


def _gather_rows(rows: Tensor) -> Tensor:
    if _world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_world())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
