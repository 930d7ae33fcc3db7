"""Caser: convolutional sequence embedding (Tang & Wang, WSDM 2018, arXiv 1809.07426)."""

# Axes: B rows, H history positions, L window, E width, F filters.
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm.config import RecommenderConfig
from rsllm.recommenders.base import ItemVectors, Recommender, initialise

VERTICAL_FILTERS = 4


class Caser(Recommender):
    """The last L items as an image, under horizontal and vertical filters (section 3.2).

    Differences from the paper:
        - No user embedding (section 3.3): held-out users are new ones.
        - A linear map takes the fully-connected layer's output to the item table that input and
          scores share; the paper has a second table for its output, of twice the width.
        - The loss is chosen (`rsllm.train.recommender`); the paper's is binary cross-entropy
          with three sampled negatives, over the next T items (section 3.4), here one.
    """

    def __init__(self, items: ItemVectors, config: RecommenderConfig, window: int) -> None:
        super().__init__(items, config, window)
        width, filters = config.width, config.num_filters
        heights = range(1, window + 1)
        self.horizontal = nn.ModuleList(nn.Conv1d(width, filters, height) for height in heights)
        self.vertical = nn.Linear(window, VERTICAL_FILTERS, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(window * filters + VERTICAL_FILTERS * width, width)
        self.out = nn.Linear(width, width)
        self.items.apply(initialise)

    def forward(self, history_BH: Tensor, length_B: Tensor) -> Tensor:
        """The state `[B, E]` after the last real item; see `Recommender.forward`."""
        image_BEL = self._image(history_BH, length_B)
        rows = [F.relu(filters(image_BEL)).amax(dim=2) for filters in self.horizontal]
        columns_BX = self.vertical(image_BEL).flatten(1)
        features_BX = self.dropout(torch.cat([*rows, columns_BX], dim=1))
        state_BE: Tensor = self.out(F.relu(self.dense(features_BX)))
        return state_BE

    def _image(self, history_BH: Tensor, length_B: Tensor) -> Tensor:
        """Item vectors `[B, E, L]`, the last item in the last column, zeros before the first."""
        place_L = torch.arange(self.window, device=length_B.device)
        source_BL = length_B[:, None] - self.window + place_L
        recent_BL = history_BH.gather(1, source_BL.clamp(0, history_BH.shape[1] - 1))
        items_BLE = self.embed(recent_BL.flip(1), length_B).flip(1)
        return items_BLE.transpose(1, 2)
