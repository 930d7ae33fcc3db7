"""GRU4Rec: session-based recommendation with recurrent networks (Hidasi et al., 1511.06939)."""

# Axes: B rows, H history positions, E width.
import torch
from torch import Tensor, nn

from rsllm.config import RecommenderConfig
from rsllm.recommenders.base import ItemVectors, Recommender, initialise


class GRU4Rec(Recommender):
    """Gated recurrent units over the history (section 3.1).

    Differences from the paper:
        - Items enter by embeddings, which scores share, instead of as one-hot vectors: the
          "constrained embedding" of the authors' follow-up (arXiv 1706.03847, section 3.3).
        - Rows are prefixes of fixed length and shuffled, instead of session-parallel batches
          (section 3.2.1): a state does not live on from batch to batch.
        - The losses of `rsllm.train.recommender` instead of BPR and TOP1 over the other rows'
          targets (section 3.2.3).
    """

    def __init__(self, items: ItemVectors, config: RecommenderConfig, window: int) -> None:
        super().__init__(items, config, window)
        width, layers = config.width, config.num_blocks
        between = config.dropout if layers > 1 else 0.0
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(width, width, layers, batch_first=True, dropout=between)
        self.out = nn.Linear(width, width)
        self.items.apply(initialise)

    def forward(self, history_BH: Tensor, length_B: Tensor) -> Tensor:
        """The state `[B, E]` after the last real item; see `Recommender.forward`.

        Padding follows the last real item, so no state that is read has seen it.
        """
        states_BHE, _ = self.gru(self.dropout(self.embed(history_BH, length_B)))
        row_B = torch.arange(len(length_B), device=length_B.device)
        state_BE: Tensor = self.out(self.dropout(states_BHE[row_B, length_B - 1]))
        return state_BE
