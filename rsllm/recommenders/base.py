"""The contract of a traditional sequential recommender: shapes, meaning, what must hold.

Subclass `Recommender` in a file of its own, and name it in `rsllm.config.models.RECOMMENDERS`.
"""

# Axes: B rows, H history positions, I items of the catalogue, E recommender width, D title width.
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm.config import RecommenderConfig

INITIAL_STD = 0.02


class TitleItems(nn.Module):
    """Item vectors that are projections of frozen title vectors, as in MoRec (arXiv 2303.13835).

    MoRec trains the text encoder too; here it is frozen, and two layers adapt it.
    """

    titles_ID: Tensor

    def __init__(self, titles_ID: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("titles_ID", titles_ID, persistent=False)
        inner = nn.Linear(titles_ID.shape[1], width)
        self.project = nn.Sequential(inner, nn.GELU(), nn.Linear(width, width))

    @property
    def weight(self) -> Tensor:
        """The item table `[I, E]`, as an embedding layer has it."""
        table_IE: Tensor = self.project(self.titles_ID)
        return table_IE


ItemVectors = nn.Embedding | TitleItems


class Recommender(nn.Module, ABC):
    """Histories in, one state per history out; a state scores every item of the catalogue.

    Input and scores share one item table, the one that fills the slots of the prompts.

    What must hold in evaluation mode (`tests/recommenders/test_contract.py` holds every model to
    it): a row's state depends on its real items and on their order, and on nothing else: not on
    what stands behind them, not on the padded width, not on the other rows of the batch.

    Args:
        items: an embedding layer, or a module whose `weight` is the item table.
        config: width, depth, dropout.
        window: longest history, in items.
    """

    def __init__(self, items: ItemVectors, config: RecommenderConfig, window: int) -> None:
        super().__init__()
        self.items, self.window = items, window

    @property
    def item_table(self) -> Tensor:
        """The trained item embeddings `[I, E]`, float, without a padding row."""
        return self.items.weight

    @abstractmethod
    def forward(self, history_BH: Tensor, length_B: Tensor) -> Tensor:
        """The state after the last real item of each history.

        Args:
            history_BH: int64 item ids, oldest first, left-aligned; entries from `length_B` on are
                padding (-1 by convention) and are never read.
            length_B: int64 number of real items, 1 to `window`.

        Returns:
            `state_BE`, float.
        """

    def scores(self, state_BE: Tensor) -> Tensor:
        """Score the whole catalogue: inner products `[B, I]` of states with the item table."""
        return state_BE @ self.item_table.T

    def embed(self, history_BH: Tensor, length_B: Tensor) -> Tensor:
        """Item vectors `[B, H, E]` at the scale of a layer's input; zero where padding stands."""
        place_H = torch.arange(history_BH.shape[1], device=history_BH.device)
        real_BH = place_H < length_B[:, None]
        table_IE = self.item_table
        items_BHE = F.embedding(history_BH.masked_fill(~real_BH, 0), table_IE)
        scaled_BHE: Tensor = items_BHE * (real_BH[..., None] * table_IE.shape[1] ** 0.5)
        return scaled_BHE


def initialise(module: nn.Module) -> None:
    """Small normal weights and zero biases, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
