"""`ItemEmbeddings`: the frozen item table of a trained recommender, with what made it."""

# Axes: I items of the catalogue, E recommender width.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rsllm.errors import CheckpointError

FILE = "items.safetensors"
REMEDY = "fit the recommender again"
_FOLD = "fold-"


@dataclass(frozen=True, eq=False)
class ItemEmbeddings:
    """Item vectors that carry no gradient; a row of zeros is an item that has none.

    Raises:
        CheckpointError: a table is not a float32 matrix of finite values, or one of a fold has
            another shape than the table.
    """

    table_IE: Tensor
    """float32 `[I, E]`; row i is item i."""
    source: str
    """Content hash of the data, config and seed that made the table."""
    fold_tables: tuple[Tensor, ...] = ()
    """Cross-fitted tables `[I, E]`, turned to fit `table_IE`: number f has not seen the training
    users whose number is f modulo the number of folds."""

    def __post_init__(self) -> None:
        for table in (self.table_IE, *self.fold_tables):
            if table.ndim != 2 or table.numel() == 0 or table.dtype != torch.float32:
                shape = tuple(table.shape)
                raise CheckpointError(f"items are {table.dtype} of shape {shape}; {REMEDY}")
            if broken := int((~torch.isfinite(table)).any(dim=1).sum()):
                raise CheckpointError(
                    f"vectors of {broken} of {len(table)} items are not finite; {REMEDY}"
                )
        if {table.shape for table in self.fold_tables} - {self.table_IE.shape}:
            raise CheckpointError("cross-fitted item tables differ in shape; fit them again")

    def save(self, folder: Path) -> None:
        """Write `items.safetensors` into an existing folder."""
        tables = {"table": self.table_IE}
        tables |= {f"{_FOLD}{n:04}": table for n, table in enumerate(self.fold_tables)}
        plain = {name: table.detach().cpu().contiguous() for name, table in tables.items()}
        save_file(plain, folder / FILE, metadata={"source": self.source})

    @classmethod
    def load(cls, folder: Path) -> ItemEmbeddings:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no usable table.
        """
        path = folder / FILE
        try:
            with safe_open(path, framework="pt") as file:
                folds = sorted(name for name in file.keys() if name.startswith(_FOLD))  # noqa: SIM118
                tables = tuple(file.get_tensor(name) for name in folds)
                return cls(file.get_tensor("table"), file.metadata()["source"], tables)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path} ({error}); {REMEDY}") from error

    def crossed_with(self, folds: Sequence[ItemEmbeddings]) -> ItemEmbeddings:
        """The table with those of the folds, each moved, turned and scaled to fit it best.

        Recommenders that were trained apart agree up to a rotation at most, and one projector has
        to read them all (orthogonal Procrustes analysis, Schoenemann 1966).

        Raises:
            CheckpointError: a fold's table has another shape.
        """
        apart = replace(self, fold_tables=tuple(fold.table_IE for fold in folds))
        fitted = tuple(_fitted(table_IE, self.table_IE) for table_IE in apart.fold_tables)
        return replace(self, fold_tables=fitted)

    def shuffled(self) -> ItemEmbeddings:
        """Ablation: every item with the vector of another one, in all tables the same."""
        other_I = other_items(len(self.table_IE))
        folds = tuple(table_IE[other_I] for table_IE in self.fold_tables)
        return ItemEmbeddings(self.table_IE[other_I], self.source, folds)

    def standardised(self) -> Tensor:
        """All tables, one below the other, at the table's zero mean and unit variance.

        Constant dimensions are 0. Items without a vector count for neither and stay at zero:
        their slots say nothing. `[(1 + folds) * I, E]`
        """
        table_IE = self.table_IE.double()
        known_IE = table_IE[table_IE.any(dim=1)]
        mean_E, deviation_E = known_IE.mean(dim=0), known_IE.std(dim=0, correction=0)
        all_XE = torch.cat([table_IE, *(table.double() for table in self.fold_tables)])
        scaled_XE = (all_XE - mean_E) / deviation_E.where(deviation_E > 0, torch.inf)
        return scaled_XE.where(all_XE.any(dim=1, keepdim=True), 0.0).float()


def other_items(count: int) -> Tensor:
    """For every item another one, always the same: the next in a random cycle of all. [I]"""
    order_I = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order_I.roll(1)[order_I.argsort()]


def _fitted(moving_IE: Tensor, fixed_IE: Tensor) -> Tensor:
    both_I = moving_IE.any(dim=1) & fixed_IE.any(dim=1)
    moving, fixed = moving_IE[both_I].double(), fixed_IE[both_I].double()
    moving_mean, fixed_mean = moving.mean(dim=0), fixed.mean(dim=0)
    centred = moving - moving_mean
    left, weights, right = torch.linalg.svd(centred.T @ (fixed - fixed_mean))
    turned_IE = (moving_IE.double() - moving_mean) @ (left @ right)
    scaled_IE: Tensor = turned_IE * (weights.sum() / centred.square().sum()) + fixed_mean
    return scaled_IE.where(moving_IE.any(dim=1, keepdim=True), 0.0).float()
