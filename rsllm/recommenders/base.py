"""The contract of a traditional sequential recommender: shapes, meaning, what must hold."""

# Axes: B rows, H history positions, I items of the catalogue, E recommender width.
from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from rsllm.config import RecommenderConfig


class Recommender(nn.Module, ABC):
    """Histories in, one state per history out; a state scores every item of the catalogue.

    What must hold in evaluation mode (`tests/recommenders/test_contract.py` holds every model to
    it): a row's state depends on its real items and on their order, and on nothing else: not on
    what stands behind them, not on the padded width, not on the other rows of the batch.

    Args:
        num_items: size I of the catalogue; item ids are 0 to I - 1.
        config: width, depth, dropout.
        window: longest history, in items.
    """

    def __init__(self, num_items: int, config: RecommenderConfig, window: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.window = window

    @property
    @abstractmethod
    def item_table(self) -> Tensor:
        """The trained item embeddings `[I, E]`, float, without a padding row."""

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
