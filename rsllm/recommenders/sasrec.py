"""SASRec: self-attentive sequential recommendation (Kang & McAuley 2018, arXiv 1808.09781)."""

# Axes: B rows, H history positions, Q updated positions, I items, E width, N attention heads,
# D width of a head.
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm.config import RecommenderConfig
from rsllm.recommenders.base import ItemVectors, Recommender, initialise


class Block(nn.Module):
    """Attention, then a point-wise feed-forward net, each as `x + dropout(f(norm(x)))`."""

    def __init__(self, config: RecommenderConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.attention_dropout = config.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BQE: Tensor, context_BHE: Tensor, sees: Tensor) -> Tensor:
        """Update Q positions from H.

        Args:
            x_BQE: positions to update.
            context_BHE: positions they may attend to, themselves among them.
            sees: bool, broadcast to `[B, N, Q, H]`; which of them each attends to.
        """
        mixed_BQE = self._attend(self.attention_norm(x_BQE), self.attention_norm(context_BHE), sees)
        x_BQE = x_BQE + self.dropout(mixed_BQE)
        updated_BQE: Tensor = x_BQE + self.dropout(self.feed_forward(x_BQE))
        return updated_BQE

    def _attend(self, x_BQE: Tensor, context_BHE: Tensor, sees: Tensor) -> Tensor:
        parts = (self.query(x_BQE), *self.key_value(context_BHE).chunk(2, dim=-1))
        query, key, value = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in parts)
        dropout = self.attention_dropout if self.training else 0.0
        mixed_BNQD = F.scaled_dot_product_attention(
            query, key, value, attn_mask=sees, dropout_p=dropout
        )
        mixed_BQE: Tensor = self.out(mixed_BNQD.transpose(1, 2).flatten(2))
        return mixed_BQE


class SASRec(Recommender):
    """Causal self-attention over item and position embeddings (section III).

    Differences from the paper:
        - Positions count back from the most recent item instead of from the start of a padded
          window, so a state does not depend on the padding.
        - The loss is chosen (`rsllm.train.recommender`); the paper's is binary with one sampled
          negative (section III-E), which the softmax over all items beats at no cost for
          catalogues of some thousand items.
        - One state per row, after its last item, since every prefix of a training user is a row
          of its own; the paper takes a loss at each position of one row per user.
    """

    block: type[Block] = Block

    def __init__(self, items: ItemVectors, config: RecommenderConfig, window: int) -> None:
        super().__init__(items, config, window)
        self.positions = nn.Embedding(window, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.width)
        self.apply(initialise)

    def forward(self, history_BH: Tensor, length_B: Tensor) -> Tensor:
        """The state `[B, E]` after the last real item; see `Recommender.forward`.

        Only the last real item needs an answer from the last block. Padding stands behind it,
        where neither the causal mask nor the last item's own looks.
        """
        last_B = length_B - 1
        age_BH = last_B[:, None] - torch.arange(history_BH.shape[1], device=history_BH.device)
        position_BHE = self.positions(age_BH.clamp(min=0))
        x_BHE = self.dropout(self.embed(history_BH, length_B) + position_BHE)
        causal_HH = age_BH[0, :, None] <= age_BH[0]
        for block in self.blocks[:-1]:
            x_BHE = block(x_BHE, x_BHE, causal_HH)
        last_B1E = x_BHE[torch.arange(len(last_B), device=last_B.device), last_B, None]
        real_B11H = (age_BH >= 0)[:, None, None]
        state_B1E: Tensor = self.norm(self.blocks[-1](last_B1E, x_BHE, real_B11H))
        return state_B1E.squeeze(1)
