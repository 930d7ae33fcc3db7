"""`ItemEmbeddings`: the frozen item table of a trained recommender, with what made it."""

# Axes: I items of the catalogue, E recommender width.
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rsllm.errors import CheckpointError

FILE = "items.safetensors"


@dataclass(frozen=True, eq=False)
class ItemEmbeddings:
    """Item vectors that carry no gradient; a row of zeros is an item that has none.

    Raises:
        CheckpointError: the table is not a float32 matrix of finite values.
    """

    table_IE: Tensor
    """float32 `[I, E]`; row i is item i."""
    source: str
    """Content hash of the data, config and seed that made the table."""

    def __post_init__(self) -> None:
        table = self.table_IE
        if table.ndim != 2 or table.numel() == 0 or table.dtype != torch.float32:
            raise CheckpointError(
                f"item embeddings are {table.dtype} of shape {tuple(table.shape)};"
                " expected torch.float32 [items, width]; fit the recommender again"
            )
        broken = int((~torch.isfinite(table)).any(dim=1).sum())
        if broken:
            raise CheckpointError(
                f"the embeddings of {broken} of {len(table)} items are not finite;"
                " fit the recommender again, with a lower learning rate if it diverged"
            )

    def save(self, folder: Path) -> None:
        """Write `items.safetensors` into an existing folder."""
        table_IE = self.table_IE.detach().cpu().contiguous()
        save_file({"table": table_IE}, folder / FILE, metadata={"source": self.source})

    @classmethod
    def load(cls, folder: Path) -> ItemEmbeddings:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no usable table.
        """
        path = folder / FILE
        try:
            with safe_open(path, framework="pt") as file:
                return cls(file.get_tensor("table"), file.metadata()["source"])
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"cannot read item embeddings from {path} ({error}); fit the recommender again"
            ) from error

    def standardised(self) -> Tensor:
        """The table with zero mean and unit variance per dimension; constant dimensions are 0.

        Items without a vector count for neither and stay at zero: their slots say nothing.
        """
        table_IE = self.table_IE.double()
        known_I = table_IE.any(dim=1)
        centred_IE = table_IE - table_IE[known_I].mean(dim=0)
        deviation_E = centred_IE[known_I].std(dim=0, correction=0)
        scaled_IE = centred_IE / deviation_E.where(deviation_E > 0, 1.0)
        return scaled_IE.where(known_I[:, None], 0.0).float()
