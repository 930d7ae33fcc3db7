"""Stages 1 and 2 as data: what trains, on which rows and prompts, from which start.

By default stage 1 trains the language model on text prompts, stage 2 the language model and the
projector on unified prompts (RSLLM, arXiv 2412.16933, abstract: two-stage tuning). LLaRA's
curriculum and direct tuning on unified prompts are stage 2 alone. Stage 0 is
`rsllm.train.recommender`.

Axes: B rows, C candidates, H history, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from rsllm.config import Experiment, StageConfig
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows, draw_candidates, row_keys
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import decision, fixed_sample, score_candidates, target_places
from rsllm.model import tuned
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Batch, Row, answer_tokens, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.train.engine import Optimization, ParameterGroup, warmup_then_cosine
from rsllm.train.health import PROBE_ROWS, health, warnings
from rsllm.train.order import by_length, evenly, mixed_step, shares, step_rows, text_only

POOL_STEPS = 16
"""Steps whose rows are put together and parted by length."""


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The training rows of one data set, their prompts, and its weight in the mixture."""

    data: PreparedData
    rows: Rows
    encoder: PromptEncoder
    weight: float
    folds: int = 0
    """Cross-fitted item tables: a user's slots come from the one that has not seen the user."""

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
                1 + int(rows.user_R[i]) % self.folds if self.folds else 0,
            )
            for i in range(len(rows))
        ]

    def length(self, row: Row, all_branches: bool) -> int:
        """Tokens of a row, in its prompt and its branches."""
        answers = self.encoder.answers(row.candidates) if all_branches else []
        branches = sum(len(answer + self.encoder.ending) - 1 for answer in answers)
        return branches + self.encoder.length(row.history, row.candidates, row.template)


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
        folds = len(model.items.fold_tables) if model.items else 0
        self.sets = [TrainingSet(data, data.rows("train"), model.encoder, 1.0, folds)]
        for other, weight in mixture:
            encoder = model.encoder.of(other.titles, other.domain)
            self.sets.append(TrainingSet(other, other.rows("train"), encoder, weight))
        written, titles = model.encoder, data.titles
        self._text_encoder = (
            PromptEncoder(written.tokenizer, titles, written.config, "text", data.domain)
            if stage.curriculum
            else None
        )
        self._pool = lru_cache(maxsize=len(self.sets))(self._make_pool)
        self.validation = fixed_sample(
            data.rows("validation"), experiment.evaluation.validation_rows
        )
        self.rows_per_step, self.steps = stage.batch_size, stage.steps
        objective = LanguageObjective(model.hybrid, stage.loss, autocast=autocast)
        self.objective: nn.Module = objective
        share = dist.get_world_size() * stage.accumulation
        self.optimization = Optimization(
            groups=_parameter_groups(model, stage),
            schedule=warmup_then_cosine(stage.steps, round(stage.warmup_share * stage.steps)),
            micro_batch=stage.batch_size // share,
            accumulation=stage.accumulation,
            max_gradient_norm=stage.max_gradient_norm,
            look_ahead=objective.look_ahead if stage.gradient_caching else list,
        )

    @property
    def all_branches(self) -> bool:
        """Whether training needs a branch per candidate."""
        loss = self.stage.loss
        return loss.gamma > 0 and loss.scorer == "likelihood"

    def batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches, encoded."""
        number, own_step = mixed_step(self.seed, step, [part.weight for part in self.sets])
        part, (pool, place) = self.sets[number], divmod(own_step, POOL_STEPS)
        rows, encoder = self._pool(number, pool)[place], part.encoder
        if self._text_encoder and text_only(self.seed, step, self.steps):
            encoder = self._text_encoder
        tokens = answer_tokens([row.target for row in rows], encoder)
        micro_batches = shares(rows, self.stage.accumulation)
        return [
            collate(
                own,
                encoder,
                part.data.catalogue.title_keys_I,
                all_branches=self.all_branches,
                tokens_per_batch=tokens / (dist.get_world_size() * len(micro_batches)),
            )
            for own in micro_batches
        ]

    def _make_pool(self, number: int, pool: int) -> list[list[Row]]:
        """The global batches of a pool of steps, each of rows of similar length."""
        part, size = self.sets[number], self.rows_per_step
        steps = range(pool * POOL_STEPS, min((pool + 1) * POOL_STEPS, self.steps))
        places = [at for s in steps for at in step_rows(self.seed, s, size, len(part.rows))]
        rows = part.decisions(places, self.seed)
        lengths = [part.length(row, self.all_branches) for row in rows]
        batches = by_length(lengths, size, [self.seed, pool], longest_first=pool == 0)
        return [[rows[i] for i in own] for own in batches]

    def due(self, step: int) -> bool:
        """Evenly spaced, the last at the end."""
        return evenly(step, self.steps, self.stage.validations)

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Mean metrics over the validation rows, which are spread over the workers.

        Beside them: how many titles and history items were cut so far for want of room, and signs
        of health.
        """
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
        encoders = [part.encoder for part in self.sets]
        dropped = sum(encoder.num_dropped_items for encoder in encoders)
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (target_ranks(scores_RC, target_places(own)), dropped))
        found, counts = zip(*gathered, strict=True)
        ranks = np.zeros(total, dtype=np.int64)
        ranks[padded] = np.stack(found, axis=1).ravel()
        cuts = {
            "prompts/cut_titles": float(sum(encoder.num_cut_titles for encoder in encoders)),
            "prompts/dropped_history_items": float(sum(counts)),
        }
        metrics = {name: float(values.mean()) for name, values in rank_metrics(ranks).items()}
        return metrics | cuts | self._health(objective)

    def _health(self, objective: LanguageObjective) -> dict[str, float]:
        """Of the first validation rows; doubts are printed."""
        rows = [decision(self.validation, i) for i in range(min(PROBE_ROWS, len(self.validation)))]
        keys = self.data.catalogue.title_keys_I
        device = next(objective.parameters()).device
        trained, plain = (
            collate(rows, self.model.encoder, keys, all_branches=branches).to(device)
            for branches in (self.all_branches, False)
        )
        found = health(objective, trained, plain)
        if dist.get_rank() == 0:
            for doubt in warnings(found):
                print(f"{self.name}: {doubt}", flush=True)
        return found

    def export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """The adapter as plain peft loads it, and the projector."""
        named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tuned.save(self.model, named, folder)


def _parameter_groups(model: tuned.LanguageModel, stage: StageConfig) -> list[ParameterGroup]:
    """What is tuned, of the backbone and of the projector; what does not learn here is frozen."""
    backbone = [p for p in model.hybrid.llm.parameters() if p.requires_grad]
    groups = {"backbone": ParameterGroup(backbone, stage.lora_learning_rate, stage.weight_decay)}
    if model.hybrid.slots is not None:
        slots = list(model.hybrid.slots.parameters())
        rate = stage.projector_learning_rate
        groups["projector"] = ParameterGroup(slots, rate, stage.weight_decay)
    for name, group in groups.items():
        for parameter in group.parameters:
            parameter.requires_grad_(stage.trains in ("all", name))
    return list(groups.values())
