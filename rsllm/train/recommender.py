"""Stage 0 as data: a traditional recommender on the training rows, early-stopped on validation."""

# Axes: B rows, H history, N negatives, I items of the catalogue, E recommender width.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm import recommenders
from rsllm.config import Experiment, RecommenderConfig
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, Rows
from rsllm.evaluate import rank
from rsllm.prompts.collate import OnDevice
from rsllm.recommenders.base import Recommender
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import write_json
from rsllm.train.batches import sample_order
from rsllm.train.engine import Optimization, ParameterGroup

SEEN_ROWS = 2000
"""Training rows scored like held-out ones."""


@dataclass(frozen=True, slots=True)
class RecommenderBatch(OnDevice):
    """Histories, what came next, and the negatives of the sampled losses."""

    history_BH: Tensor
    length_B: Tensor
    target_B: Tensor
    negative_BN: Tensor
    expected_BN: Tensor
    """How often each negative is expected among a row's; infinite for the row's own target."""

    @property
    def num_tokens(self) -> int:
        """Items of the histories."""
        return int(self.length_B.sum())


class NextItem(nn.Module):
    """A recommender whose training tells each row's next item from the others."""

    def __init__(self, model: Recommender, config: RecommenderConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: RecommenderBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the next items."""
        state_BE, table_IE = self.model(batch.history_BH, batch.length_B), self.model.item_table
        if self.config.loss == "softmax":
            loss = F.cross_entropy(self.model.scores(state_BE), batch.target_B)
        else:
            item_BX = torch.cat([batch.target_B[:, None], batch.negative_BN], dim=1)
            score_BX = torch.einsum("be,bxe->bx", state_BE, F.embedding(item_BX, table_IE))
            target_B, negative_BN = score_BX[:, 0], score_BX[:, 1:]
            if self.config.loss == "bce":
                loss = binary(target_B, negative_BN)
            else:
                loss = sampled_softmax(target_B, negative_BN, batch.expected_BN)
        return loss, {"loss": loss.detach()}


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


class Negatives:
    """Draws the negatives of a step, as a pure function of it.

    Binary cross-entropy takes them evenly from all items but the target, as LLaRA's origin does.
    The sampled softmax takes them in proportion to training interactions plus one, so that it
    sees the items that its sum is made of, and corrects for it.
    """

    def __init__(self, config: RecommenderConfig, counts_I: NDArray[np.int64]) -> None:
        self.config = config
        self.num_items = len(counts_I)
        self.share_I = (counts_I + 1.0) / (counts_I + 1.0).sum()
        self.bounds_I = self.share_I.cumsum()

    def draw(self, step: int, target_B: NDArray[np.integer[Any]]) -> tuple[Any, Any]:
        """Negatives [B, N] of a global batch, and how often each is expected among the N."""
        config, shape = self.config, (len(target_B), self.config.num_negatives)
        if config.loss == "softmax":
            return np.empty((len(target_B), 0), np.int64), np.empty((len(target_B), 0), np.float32)
        rng = np.random.default_rng([config.seed, step, 1])
        if config.loss == "bce":
            other_BN = rng.integers(self.num_items - 1, size=shape)
            other_BN += other_BN >= target_B[:, None]
            return other_BN, np.ones(shape, np.float32)
        drawn_BN = np.searchsorted(self.bounds_I, rng.random(shape) * self.bounds_I[-1], "right")
        expected_BN = config.num_negatives * self.share_I[drawn_BN]
        expected_BN[drawn_BN == target_B[:, None]] = np.inf
        return drawn_BN, expected_BN.astype(np.float32)


class RecommenderTask:
    """A recommender on the training rows, or on those of all users but one part of them.

    Args:
        experiment: its recommender and window.
        data: the prepared data.
        titles_ID: frozen title vectors, if they stand for the items.
        fold: the part of the training users that is left out, for cross-fitting.
    """

    name = "recommender"
    metric = "MRR"

    def __init__(
        self,
        experiment: Experiment,
        data: PreparedData,
        titles_ID: Tensor | None = None,
        fold: int | None = None,
    ) -> None:
        config = experiment.recommender
        self.config, self.data, self.seed = config, data, config.seed
        self.rows, self.validation = self._rows("train"), self._rows("validation")
        self.counts_I = data.catalogue.counts_I
        if fold is not None:
            self.rows = self.rows.take(self.rows.user_R % config.folds != fold)
            self.counts_I = _num_users(self.rows, len(data.titles))
        self.rows_per_step = min(config.batch_size, len(self.rows))
        self.steps_per_epoch = len(self.rows) // self.rows_per_step
        self.steps = max(1, round(config.max_epochs * self.steps_per_epoch))
        self.patience = config.patience
        self.negatives = Negatives(config, self.counts_I)
        torch.manual_seed(config.seed)
        self.model = recommenders.build(config, len(data.titles), experiment.data.window, titles_ID)
        self.objective: nn.Module = NextItem(self.model, config)
        parameters = list(self.model.parameters())
        group = ParameterGroup(parameters, config.learning_rate, config.weight_decay)
        self.optimization = Optimization(
            groups=[group],
            schedule=lambda step: 1.0,
            micro_batch=self.rows_per_step // dist.get_world_size(),
        )

    def _rows(self, split: Any) -> Rows:
        rows = self.data.rows(split)
        return rows.shuffled(self.seed) if self.config.shuffle_history else rows

    def batches(self, step: int) -> list[RecommenderBatch]:
        """This worker's share of the global batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.rows_per_step
        order_R = sample_order(self.seed, epoch, len(self.rows))
        rows = self.rows.take(order_R[start : start + self.rows_per_step])
        negative_BN, expected_BN = self.negatives.draw(step, rows.target_R)
        arrays = (rows.history_RH, rows.length_R, rows.target_R, negative_BN)
        own = np.arange(len(rows))[dist.get_rank() :: dist.get_world_size()]
        history, length, target, negative = (torch.from_numpy(a[own]).long() for a in arrays)
        expected = torch.from_numpy(expected_BN[own])
        return [RecommenderBatch(history, length, target, negative, expected)]

    def feed(self, start: int) -> Iterator[list[RecommenderBatch]]:
        """The batches of a step and of all after it."""
        return map(self.batches, range(start, self.steps))

    def due(self, step: int) -> bool:
        """After each epoch."""
        return step % self.steps_per_epoch == 0

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Metrics as exact expectations over uniform candidate draws, or else on the drawn sets."""
        assert isinstance(objective, NextItem)
        return self._means(objective.model, self.validation)

    def _means(self, model: Recommender, rows: Rows) -> dict[str, float]:
        score = partial(rank.catalogue_scores, model)
        per_user = rank.catalogue_metrics(score, rows, self.data)
        return {name: float(values.mean()) for name, values in per_user.items()}

    def export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Weights that score by themselves, the frozen item table, and metrics on training rows.

        The table leaves out the items that never trained, whose vectors only ever were negatives;
        the recommender's own scores keep them. Projected titles are kept as what they project to.
        """
        named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        self.model.load_state_dict(named)
        self.model.eval()
        recommenders.save(self.model, folder)
        seen = self._means(self.model, rank.fixed_sample(self.rows, SEEN_ROWS))
        write_json(folder / recommenders.SEEN, seen)
        table_IE = self.model.item_table.detach().float().cpu().clone()
        table_IE[torch.from_numpy(self.counts_I == 0)] = 0.0
        ItemEmbeddings(table_IE, source=self.data.path.name).save(folder)


def _num_users(rows: Rows, num_items: int) -> NDArray[np.int64]:
    """How many users of some rows have each item, as a target or in a history. [I]"""
    item_RX = np.column_stack([rows.history_RH, rows.target_R]).astype(np.int64)
    pair_RX = rows.user_R[:, None].astype(np.int64) * num_items + item_RX
    return np.bincount(np.unique(pair_RX[item_RX != NO_ITEM]) % num_items, minlength=num_items)
