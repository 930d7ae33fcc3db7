"""eSASRec: SASRec with the layers of LiGR (Tikhonovich et al. 2025, arXiv 2508.06450)."""

# Axes: B rows, H history positions, Q updated positions, E width.
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm.config import RecommenderConfig
from rsllm.recommenders.sasrec import Block, SASRec

WIDENING = 4
"""Hidden width of the feed-forward net, as a multiple of its input's."""


class GatedBlock(Block):
    """Attention, then a SwiGLU net, each as `x + sigmoid(gate(x)) * dropout(f(norm(x)))`.

    The gates are those of LiGR (arXiv 2502.03417), the net is that of arXiv 2002.05202.
    """

    def __init__(self, config: RecommenderConfig) -> None:
        super().__init__(config)
        self.attention_gate = nn.Linear(config.width, config.width)
        self.feed_forward_gate = nn.Linear(config.width, config.width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(config.width), SwiGLU(config))

    def forward(self, x_BQE: Tensor, context_BHE: Tensor, sees: Tensor) -> Tensor:
        """Update Q positions from H; see `Block.forward`."""
        mixed_BQE = self._attend(self.attention_norm(x_BQE), self.attention_norm(context_BHE), sees)
        x_BQE = x_BQE + self.attention_gate(x_BQE).sigmoid() * self.dropout(mixed_BQE)
        changed_BQE = self.dropout(self.feed_forward(x_BQE))
        updated_BQE: Tensor = x_BQE + self.feed_forward_gate(x_BQE).sigmoid() * changed_BQE
        return updated_BQE


class SwiGLU(nn.Module):
    """A hidden layer that a second one gates."""

    def __init__(self, config: RecommenderConfig) -> None:
        super().__init__()
        hidden = WIDENING * config.width
        self.opened = nn.Linear(config.width, 2 * hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x_BQE: Tensor) -> Tensor:
        """Returns what is to be added to `x_BQE`."""
        gate, value = self.opened(x_BQE).chunk(2, dim=-1)
        changed_BQE: Tensor = self.out(self.dropout(F.silu(gate) * value))
        return changed_BQE


class eSASRec(SASRec):
    """SASRec, whose layers are gated.

    Differences from the paper are those of `SASRec`: positions count back, every prefix is a row of
    its own instead of a loss at every position, and the loss is chosen. By default it is the
    softmax over all items, for which the paper's sampled one (`recommender.loss=sampled-softmax`)
    stands in where these are too many.
    """

    block = GatedBlock
