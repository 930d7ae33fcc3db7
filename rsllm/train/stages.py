"""The three stages as data: what trains, on which rows and prompts, from which start.

Stage 0 trains the recommender, stage 1 the language model on text prompts, stage 2 the language
model and the projector on unified prompts (RSLLM, arXiv 2412.16933, abstract: two-stage tuning).

Axes: B rows, H history, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm import recommenders
from rsllm.config import Experiment, StageConfig
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows, draw_candidates, row_keys
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import (
    candidate_scores,
    catalogue_scores,
    expected_over_draws,
    fixed_sample,
    score_candidates,
    target_places,
)
from rsllm.model import tuned
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Batch, Row, answer_tokens, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.recommenders.base import Recommender
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.train.engine import Optimization, ParameterGroup, warmup_then_cosine

RECOMMENDER = "recommender.safetensors"
GOLDEN_RATIO = (5**0.5 - 1) / 2


def sample_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order in which an epoch visits the rows: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def step_rows(seed: int, step: int, batch_size: int, num_rows: int) -> list[tuple[int, int]]:
    """(epoch, row) of a step's global batch: a pure function, the same for any world size."""
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs = {place // num_rows for place in places}
    orders = {epoch: sample_order(seed, epoch, num_rows) for epoch in epochs}
    return [(p // num_rows, int(orders[p // num_rows][p % num_rows])) for p in places]


def mixed_step(seed: int, step: int, weights: Sequence[float]) -> tuple[int, int]:
    """Which data set a step belongs to, and how many earlier steps belong to it too.

    A pure function, so that resuming and other world sizes see the same rows. Steps are dealt out
    by a Kronecker sequence with the golden ratio, so each data set's share of any run of steps is
    within a few steps of its weight.
    """
    bounds = np.cumsum(weights) / np.sum(weights)
    start = np.random.default_rng(seed).random()
    place_S = (start + np.arange(step + 1) * GOLDEN_RATIO) % 1.0
    set_S = np.searchsorted(bounds[:-1], place_S, "right")
    return int(set_S[-1]), int((set_S[:-1] == set_S[-1]).sum())


def _shares(rows: Sequence[Any], accumulation: int) -> list[Sequence[Any]]:
    """This worker's micro-batches of a global batch."""
    own = rows[dist.get_rank() :: dist.get_world_size()]
    return [own[i::accumulation] for i in range(accumulation)]


def _evenly(step: int, steps: int, times: int) -> bool:
    """Whether `step` is one of `times` evenly spaced steps, the last of which is `steps`."""
    return step in {round(steps * (i + 1) / times) for i in range(times)}


@dataclass(frozen=True, slots=True)
class RecommenderBatch:
    """Histories and what came next."""

    history_BH: Tensor
    length_B: Tensor
    target_B: Tensor

    @classmethod
    def of(cls, rows: Rows) -> RecommenderBatch:
        """Tensors of some rows."""
        arrays = (rows.history_RH, rows.length_R, rows.target_R)
        return cls(*(torch.tensor(array, dtype=torch.long) for array in arrays))

    def to(self, device: torch.device) -> RecommenderBatch:
        """The same batch on another device."""
        parts = (self.history_BH, self.length_B, self.target_B)
        return RecommenderBatch(*(part.to(device) for part in parts))


class FullSoftmax(nn.Module):
    """A recommender under cross-entropy over the whole catalogue."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: RecommenderBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the next item."""
        scores_BI = self.model.scores(self.model(batch.history_BH, batch.length_B))
        loss = F.cross_entropy(scores_BI, batch.target_B)
        return loss, {"loss": loss.detach()}


class RecommenderTask:
    """Stage 0: a traditional recommender on the training rows, early-stopped on validation."""

    name = "recommender"
    metric = "MRR"

    def __init__(self, experiment: Experiment, data: PreparedData) -> None:
        config = experiment.recommender
        self.config, self.data, self.seed = config, data, config.seed
        self.rows, self.validation = data.rows("train"), data.rows("validation")
        self.rows_per_step = min(config.batch_size, len(self.rows))
        self.steps_per_epoch = len(self.rows) // self.rows_per_step
        self.steps = max(1, round(config.max_epochs * self.steps_per_epoch))
        self.patience = config.patience
        torch.manual_seed(config.seed)
        self.model = recommenders.build(config, len(data.titles), experiment.data.window)
        self.objective: nn.Module = FullSoftmax(self.model)
        group = ParameterGroup(
            list(self.model.parameters()), config.learning_rate, config.weight_decay
        )
        self.optimization = Optimization(
            groups=[group],
            schedule=lambda step: 1.0,
            micro_batch=self.rows_per_step // dist.get_world_size(),
        )

    def batches(self, step: int) -> list[RecommenderBatch]:
        """This worker's share of the global batch."""
        places = step_rows(self.seed, step, self.rows_per_step, len(self.rows))
        (own,) = _shares(places, 1)
        return [RecommenderBatch.of(self.rows.take(np.array([row for _, row in own])))]

    def due(self, step: int) -> bool:
        """After each epoch."""
        return step % self.steps_per_epoch == 0

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Metrics as exact expectations over uniform candidate draws, or else on the drawn sets."""
        assert isinstance(objective, FullSoftmax)
        scores_RI = catalogue_scores(objective.model, self.validation)
        per_user = expected_over_draws(scores_RI, self.validation, self.data)
        if not per_user:
            chosen_RC = candidate_scores(scores_RI, self.validation)
            per_user = rank_metrics(target_ranks(chosen_RC, target_places(self.validation)))
        return {name: float(values.mean()) for name, values in per_user.items()}

    def export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Whole weights, and the frozen item table, without the items that never trained.

        Those have vectors that only ever were negatives; the recommender's own scores keep them.
        """
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(weights, folder / RECOMMENDER)
        self.model.load_state_dict(weights)
        table_IE = self.model.item_table.detach().float().cpu().clone()
        table_IE[torch.from_numpy(self.data.catalogue.counts_I == 0)] = 0.0
        ItemEmbeddings(table_IE, source=self.data.path.name).save(folder)


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The training rows of one data set, their prompts, and its weight in the mixture."""

    data: PreparedData
    rows: Rows
    encoder: PromptEncoder
    weight: float

    def decisions(self, places: Sequence[tuple[int, int]], seed: int) -> list[Row]:
        """Rows at (epoch, row) under the evaluation's candidate rule, redrawn each epoch."""
        epoch_B, index_B = np.array(places).T
        rows, config = self.rows.take(index_B), self.data.config
        keys_B = row_keys(seed, "train", rows.user_R, rows.position_R, epoch_B)
        candidates_BC = draw_candidates(
            keys_B,
            rows.history_RH,
            rows.target_R,
            self.data.catalogue,
            config["num_candidates"],
            config["candidates"],
        )
        return [
            Row(
                rows.histories(i).tolist(),
                candidates_BC[i].tolist(),
                int(rows.target_R[i]),
                int(rows.user_R[i]),
                int(keys_B[i] >> np.uint64(48)),
            )
            for i in range(len(rows))
        ]


class LanguageTask:
    """Stage 1 or 2: the language model on one kind of prompt; every batch is of one data set."""

    metric = "MRR"
    patience = 0

    def __init__(
        self,
        experiment: Experiment,
        stage: StageConfig,
        data: PreparedData,
        model: tuned.LanguageModel,
        *,
        name: str,
        autocast: bool,
        mixture: Sequence[tuple[PreparedData, float]] = (),
    ) -> None:
        self.experiment, self.stage, self.data, self.model = experiment, stage, data, model
        self.name, self.seed = name, stage.seed
        self.sets = [TrainingSet(data, data.rows("train"), model.encoder, 1.0)]
        for other, weight in mixture:
            encoder = model.encoder.of(other.titles, other.domain)
            self.sets.append(TrainingSet(other, other.rows("train"), encoder, weight))
        self.validation = fixed_sample(
            data.rows("validation"), experiment.evaluation.validation_rows
        )
        self.rows_per_step, self.steps = stage.batch_size, stage.steps
        self.objective: nn.Module = LanguageObjective(model.hybrid, stage.loss, autocast=autocast)
        share = dist.get_world_size() * stage.accumulation
        self.optimization = Optimization(
            groups=_parameter_groups(model, stage),
            schedule=warmup_then_cosine(stage.steps, round(stage.warmup_share * stage.steps)),
            micro_batch=stage.batch_size // share,
            accumulation=stage.accumulation,
            max_gradient_norm=stage.max_gradient_norm,
        )

    @property
    def all_branches(self) -> bool:
        """Whether training needs a branch per candidate."""
        loss = self.stage.loss
        return loss.gamma > 0 and loss.scorer == "likelihood"

    def batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches, encoded."""
        number, own_step = mixed_step(self.seed, step, [part.weight for part in self.sets])
        part = self.sets[number]
        places = step_rows(self.seed, own_step, self.rows_per_step, len(part.rows))
        tokens = answer_tokens([part.rows.target_R[row] for _, row in places], part.encoder)
        shares = _shares(places, self.stage.accumulation)
        return [
            collate(
                part.decisions(share, self.seed),
                part.encoder,
                part.data.catalogue.title_keys_I,
                all_branches=self.all_branches,
                tokens_per_batch=tokens / (dist.get_world_size() * len(shares)),
            )
            for share in shares
        ]

    def due(self, step: int) -> bool:
        """Evenly spaced, the last at the end."""
        return _evenly(step, self.steps, self.stage.validations)

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Mean metrics over the validation rows, which are spread over the workers."""
        assert isinstance(objective, LanguageObjective)
        world, total = dist.get_world_size(), len(self.validation)
        padded = np.resize(np.arange(total), -(-total // world) * world)
        own = self.validation.take(padded[dist.get_rank() :: world])
        scores_RC = score_candidates(
            objective,
            own,
            self.model.encoder,
            self.data,
            self.stage.loss.ranks_by,
            batch_size=self.experiment.evaluation.batch_size,
        )
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, target_ranks(scores_RC, target_places(own)))
        ranks = np.zeros(total, dtype=np.int64)
        ranks[padded] = np.stack(gathered, axis=1).ravel()
        return {name: float(values.mean()) for name, values in rank_metrics(ranks).items()}

    def export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """The adapter as plain peft loads it, and the projector."""
        named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tuned.save(self.model, named, folder)


def _parameter_groups(model: tuned.LanguageModel, stage: StageConfig) -> list[ParameterGroup]:
    adapter = [p for p in model.hybrid.llm.parameters() if p.requires_grad]
    groups = [ParameterGroup(adapter, stage.lora_learning_rate, stage.weight_decay)]
    if model.hybrid.slots is not None:
        slots = list(model.hybrid.slots.parameters())
        groups.append(ParameterGroup(slots, stage.projector_learning_rate, stage.weight_decay))
    return groups
