"""RSLLM's losses, and the ranking loss that is ours.

L = (1 - alpha - beta) L_NIP + alpha L_TT + beta L_UT + gamma L_rank. RSLLM (arXiv 2412.16933)
names one language-model and two InfoNCE-like losses; their exact form is reconstructed from CALRec
(arXiv 2405.02429). L_rank is an extension; gamma = 0 is the paper.

Contrasts run over all rows that a step sees at once: of every worker and, with cached gradients, of
every micro-batch. Each worker computes the whole of them.

Axes: B own rows, M rows of all workers, D width, K candidates, H history.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rsllm.prompts.collate import Batch
from rsllm.prompts.encode import NO_ITEM


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
    """One contrastive loss over rows, or positions, and what tells whether it has leverage."""

    loss: Tensor
    accuracy: Tensor
    """Share of rows, or positions, whose own answer is nearer than every negative."""
    num_negatives: Tensor
    """Mean number of negatives per row."""
    cosine: Tensor | None = None
    """Mean cosine with the negatives, of rows."""

    def facts(self, name: str) -> dict[str, Tensor]:
        """What logs say of it."""
        of_negatives = {} if self.cosine is None else {f"contrast/{name}_cosine": self.cosine}
        return of_negatives | {
            f"loss/{name}_contrast": self.loss.detach(),
            f"contrast/{name}_accuracy": self.accuracy,
            f"contrast/{name}_negatives": self.num_negatives,
        }


def contrast(
    anchors_MD: Tensor,
    others_MD: Tensor,
    negative_MM: Tensor,
    temperature: float,
    *,
    symmetric: bool = False,
) -> Contrast:
    """-log softmax over {own} and negatives j of cos(other_j, anchor_i) / temperature, mean over i.

    Args:
        anchors_MD: v^T_i, the target item on its own.
        others_MD: v^{T|U}_j (L_TT) or v^U_j (L_UT).
        negative_MM: True where other j may serve as a negative of anchor i.
        symmetric: also over the anchors j whose negative other i is, and the mean of both.

    A row without negatives adds 0, and so does a batch without rows.
    """
    num_rows = max(1, len(anchors_MD))
    cosine_MM = F.normalize(anchors_MD.float(), dim=-1) @ F.normalize(others_MD.float(), dim=-1).T
    own_MM = torch.eye(len(cosine_MM), dtype=torch.bool, device=cosine_MM.device)
    logits_MM = (cosine_MM / temperature).masked_fill(~(negative_MM | own_MM), -torch.inf)
    own_M = torch.arange(len(cosine_MM), device=cosine_MM.device)
    with torch.no_grad():
        num_negatives = negative_MM.sum()
        off_diagonal = (cosine_MM * negative_MM).sum() / num_negatives.clamp(min=1)
        rivals_MM = logits_MM.masked_fill(own_MM, -torch.inf)
        nearest_M = (rivals_MM < logits_MM.diagonal()[:, None]).all(1)
    loss = F.cross_entropy(logits_MM, own_M, reduction="sum") / num_rows
    if symmetric:
        loss = (loss + F.cross_entropy(logits_MM.T, own_M, reduction="sum") / num_rows) / 2
    return Contrast(loss, nearest_M.sum() / num_rows, num_negatives / num_rows, off_diagonal)


def negatives(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Who is a negative of whom, over the rows of these micro-batches on all workers.

    Row j is a negative of row i if its target has another title and its user is another; for L_UT
    also if target i is not in history j. All rows of a step are of one domain.

    Returns:
        negative_MM of L_TT, and of L_UT.
    """
    title_M = gather(torch.cat([batch.title_B for batch in batches]))
    user_M = gather(torch.cat([batch.user_B for batch in batches]))
    seen_BM = torch.cat([(b.past_BH[:, None] == title_M[:, None]).any(-1) for b in batches])
    differs_MM = (title_M[:, None] != title_M) & (user_M[:, None] != user_M)
    return differs_MM, differs_MM & (gather(seen_BM.byte()).T == 0)


def distinct_targets(batches: Sequence[Batch], items_IE: Tensor) -> tuple[Tensor, Tensor]:
    """Which of all rows to align: one for each distinct target that has an item vector.

    Returns:
        The rows, [G], and negative_GG: whose titles differ.
    """
    slot_B = torch.cat([batch.slot_B for batch in batches])
    slot_M = gather(slot_B.where(items_IE[slot_B].any(dim=1), NO_ITEM))
    title_M = gather(torch.cat([batch.title_B for batch in batches]))
    earlier_MM = (slot_M[:, None] == slot_M).tril(-1)
    rows_G = torch.where((slot_M != NO_ITEM) & ~earlier_MM.any(dim=1))[0]
    return rows_G, title_M[rows_G, None] != title_M[rows_G]


def gather(rows_B: Tensor) -> Tensor:
    """The rows of all workers, in rank order: [B, ...] -> [M, ...].

    Differentiable where every worker computes the same from them and gradients are averaged: own
    rows take what all send back, which is what one computes, times the workers.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return rows_B
    fixed_B = rows_B.detach().contiguous()
    parts = [torch.empty_like(fixed_B) for _ in range(world)]
    dist.all_gather(parts, fixed_B)
    parts[dist.get_rank()] = fixed_B + world * (rows_B - fixed_B)
    return torch.cat(parts)
