"""What a recommender is trained for: one row's next item against the others.

Each loss takes the target's score and those of other items, and is a mean over rows.
"""

# Axes: B rows, N negatives, I items of the catalogue.
import torch
from torch import Tensor
from torch.nn import functional as F


def full_softmax(scores_BI: Tensor, target_B: Tensor) -> Tensor:
    """Cross-entropy over the whole catalogue."""
    return F.cross_entropy(scores_BI, target_B)


def sampled_softmax(target_B: Tensor, negative_BN: Tensor, expected_BN: Tensor) -> Tensor:
    """Cross-entropy over a sample of the catalogue, without the bias of how it was drawn.

    Weighing each negative by 1 / (how often it is expected in the sample) makes the sum in the
    softmax an unbiased estimate of the sum over all other items (Bengio & Senecal 2008, "Adaptive
    importance sampling"). The target is there with certainty and keeps its score.

    Args:
        target_B: scores of the targets.
        negative_BN: scores of items drawn with replacement.
        expected_BN: how often each is expected among the N; infinite where the draw is no
            negative, which takes it out of the sum.
    """
    corrected_BN = negative_BN - expected_BN.log()
    all_BX = torch.cat([target_B[:, None], corrected_BN], dim=1)
    return (all_BX.logsumexp(dim=1) - target_B).mean()


def binary(target_B: Tensor, negative_BN: Tensor) -> Tensor:
    """Binary cross-entropy of the target and of each negative (SASRec, arXiv 1808.09781, III-E).

    With one negative per row, the loss of LLaRA's recommenders (arXiv 2312.02445).
    """
    return (F.softplus(-target_B)[:, None] + F.softplus(negative_BN)).mean()
