"""Stages 1 and 2 as data: what trains, on which rows and prompts, from which start.

By default stage 1 trains the language model on text prompts, stage 2 the language model and the
projector on unified prompts (RSLLM, arXiv 2412.16933, abstract: two-stage tuning). LLaRA's
curriculum and direct tuning on unified prompts are stage 2 alone. Stage 0 is
`rsllm.train.recommender`.

Axes: B rows, C candidates, H history, I items.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from rsllm.config import Experiment, StageConfig
from rsllm.data.hashing import stream_seed
from rsllm.data.histories import Histories
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.evaluate.groups import FEWEST_USERS, target_groups
from rsllm.evaluate.metrics import compared_metrics, rank_metrics, target_ranks
from rsllm.evaluate.rank import (
    catalogue_metrics,
    decision,
    fixed_sample,
    history_rows,
    score_candidates,
    score_catalogue,
    target_places,
)
from rsllm.evaluate.statistics import mean_interval
from rsllm.model import tuned
from rsllm.model.history import HistoryObjective
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Batch, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.prompts.histories import HistoryBatch, Whole, collate_histories
from rsllm.train.batches import HistorySet, StepBatches, TrainingSet, text_only
from rsllm.train.engine import Optimization, ParameterGroup, warmup_then_cosine
from rsllm.train.health import PROBE_ROWS, health, slots_health, warnings

Stream = Callable[[StepBatches, int], Iterator[list[Batch | HistoryBatch]]]
"""Makes the batches of a step and of all after it."""


class LanguageTask:
    """Stage 1 or 2: the language model on one kind of prompt; every batch is of one data set.

    Args:
        stream: where batches are made, by default in this process.
    """

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
        stream: Stream = StepBatches.in_turn,
    ) -> None:
        self.experiment, self.stage, self.data, self.model = experiment, stage, data, model
        self.name, self.autocast = name, autocast
        self.doubted = set[str]()  # each doubt is printed once
        self.seed = stream_seed(stage.seed, name)
        folds = len(model.items.fold_tables) if model.items else 0
        sets = [self._set(data, model.encoder, 1.0, folds)]
        for other, weight in mixture:
            encoder = model.encoder.of(other.titles, other.domain)
            sets.append(self._set(other, encoder, weight))
        text = model.encoder.of(data.titles, data.domain, "text") if stage.curriculum else None
        rank, world = dist.get_rank(), dist.get_world_size()
        self.batches = StepBatches(stage, sets, text, seed=self.seed, rank=rank, world=world)
        self._stream = stream
        held_out = data.rows("validation")
        self.validation = fixed_sample(held_out, experiment.evaluation.validation_rows)
        self.groups = target_groups(self.validation, data)
        self.rows_per_step, self.steps = stage.batch_size, stage.steps
        look_ahead: Callable[[Sequence[Any]], Sequence[Any]] = list
        self.objective: nn.Module
        if stage.prompts == "history":
            self.objective = HistoryObjective(model.hybrid, stage.loss, autocast=autocast)
        else:
            self.objective = LanguageObjective(model.hybrid, stage.loss, autocast=autocast)
            look_ahead = self.objective.look_ahead if stage.gradient_caching else list
        self.optimization = Optimization(
            groups=_parameter_groups(model, stage, self.seed),
            schedule=warmup_then_cosine(stage.steps, round(stage.warmup_share * stage.steps)),
            micro_batch=stage.batch_size // (world * stage.accumulation),
            accumulation=stage.accumulation,
            max_gradient_norm=stage.max_gradient_norm,
            look_ahead=look_ahead,
        )

    def _set(
        self, data: PreparedData, encoder: PromptEncoder, weight: float, folds: int = 0
    ) -> TrainingSet | HistorySet:
        """The training rows of one data set, in the form of the stage's prompts."""
        stage, rows = self.stage, data.rows("train")
        if stage.prompts == "choice":
            return TrainingSet(data, rows, encoder, weight, folds)
        histories = Histories.of(rows, self.experiment.prompt.history_items)
        sampled = stage.loss.negatives == "batch"
        return HistorySet(data, histories, encoder, weight, folds, sampled)

    def feed(self, start: int) -> Iterator[list[Batch | HistoryBatch]]:
        """This worker's micro-batches of a step and of all after it."""
        return self._stream(self.batches, start)

    def due(self, step: int) -> bool:
        """Evenly spaced, the last at the end."""
        times = self.stage.validations
        return step in {round(self.steps * (i + 1) / times) for i in range(times)}

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Mean metrics over the validation rows, which are spread over the workers.

        Beside them: how many titles and history items were cut so far for want of room, and signs
        of health.
        """
        assert isinstance(objective, LanguageObjective | HistoryObjective)
        world, total = dist.get_world_size(), len(self.validation)
        padded = np.resize(np.arange(total), -(-total // world) * world)
        found = self._ranked(objective, self.validation.take(padded[dist.get_rank() :: world]))
        dropped = self.batches.num_dropped_items
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (found, dropped))
        parts, counts = zip(*gathered, strict=True)
        of_rows = {}
        for name in found:
            of_rows[name] = np.empty(total)
            of_rows[name][padded] = np.stack([part[name] for part in parts], axis=1).ravel()
        cut = sum(part.encoder.num_cut_titles for part in self.batches.sets)
        cuts = {"prompts/cut_titles": cut, "prompts/dropped_history_items": sum(counts)}
        metrics = {name: values.mean() for name, values in of_rows.items()} | cuts
        metrics |= self._by_target(of_rows)
        return {name: float(value) for name, value in metrics.items()} | self._health(objective)

    def _ranked(
        self, objective: LanguageObjective | HistoryObjective, rows: Rows
    ) -> dict[str, np.ndarray]:
        """The metrics of each row: exact expectations over candidate draws where all is scored."""
        encoder, scorer = self.model.encoder, self.stage.ranks_by
        size = self.experiment.evaluation.batch_size
        if isinstance(objective, HistoryObjective) and scorer == "catalogue":
            score = partial(score_catalogue, objective, encoder=encoder, batch_size=size)
            return catalogue_metrics(score, rows, self.data)
        plain = LanguageObjective(objective.model, self.stage.loss, autocast=self.autocast)
        scores_RC = score_candidates(plain, rows, encoder, self.data, scorer, batch_size=size)
        return rank_metrics(target_ranks(scores_RC, target_places(rows)))

    def _by_target(self, of_rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        """How sure the MRR is, and metrics by groups of targets, for the card."""
        mrr = mean_interval(of_rows["MRR"])
        found = {"targets/all/MRR_low": mrr.low, "targets/all/MRR_high": mrr.high}
        for name, own_R in self.groups.items():
            found[f"targets/{name}/n"] = n = own_R.sum()
            if n >= FEWEST_USERS:
                for metric in compared_metrics():
                    found[f"targets/{name}/{metric}"] = of_rows[metric][own_R].mean()
        return found

    def _health(self, objective: LanguageObjective | HistoryObjective) -> dict[str, float]:
        """Of the first validation rows; doubts are printed, each once."""
        probe, encoder = self.validation.take(slice(PROBE_ROWS)), self.model.encoder
        device = next(objective.parameters()).device
        if isinstance(objective, HistoryObjective):
            histories, counts_I = history_rows(probe), self.data.catalogue.counts_I
            whole = Whole.of(histories, encoder, counts_I)
            batch = collate_histories(histories, encoder, len(counts_I), whole)
            found = slots_health(objective, batch.to(device))
        else:
            rows = [decision(probe, i) for i in range(len(probe))]
            keys = self.data.catalogue.title_keys_I
            plain = collate(rows, encoder, keys, all_branches=False)
            found = health(objective, plain.to(device))
        if dist.get_rank() == 0:
            for name in [name for name in found if name not in self.doubted]:
                for doubt in warnings({name: found[name]}):
                    print(f"{self.name}: {doubt}", flush=True)
                    self.doubted.add(name)
        return found

    def export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """The adapter as plain peft loads it, and the projector."""
        named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tuned.save(self.model, named, folder)


def _parameter_groups(
    model: tuned.LanguageModel, stage: StageConfig, seed: int
) -> list[ParameterGroup]:
    """What is tuned, of the backbone and of the projector; what does not learn here is frozen.

    A step without slots tells the projector nothing, unless slots are aligned with titles.
    """
    by_text = stage.curriculum and not stage.loss.alignment
    backbone = [p for p in model.hybrid.llm.parameters() if p.requires_grad]
    groups = {"backbone": ParameterGroup(backbone, stage.lora_learning_rate, stage.weight_decay)}
    if model.hybrid.slots is not None:
        slots = list(model.hybrid.slots.parameters())
        rate = stage.projector_learning_rate
        rests = lambda step: by_text and text_only(seed, step, stage.steps)  # noqa: E731
        groups["projector"] = ParameterGroup(slots, rate, stage.weight_decay, rests)
    for name, group in groups.items():
        for parameter in group.parameters:
            parameter.requires_grad_(stage.trains in ("all", name))
    return [*groups.values(), *_catalogue_groups(model, stage)]


def _catalogue_groups(model: tuned.LanguageModel, stage: StageConfig) -> list[ParameterGroup]:
    """The catalogue scorer's parameters, apart from those that no loss of the stage reaches."""
    if model.hybrid.catalogue is None:
        return []
    used: list[nn.Parameter] = []
    unused: list[nn.Parameter] = []
    by_one = {"answer_map": ["target"], "state_map": ["user"], "state_gain": ["user"]}
    for part, module in model.hybrid.catalogue.named_children():
        losses = {f"{name}_contrast" for name in by_one.get(part, ["target", "user"])}
        module.requires_grad_(bool(losses & stage.loss.weights.keys()))
        (used if losses & stage.loss.weights.keys() else unused).extend(module.parameters())
    rate = stage.catalogue_learning_rate
    return [ParameterGroup(part, rate, stage.weight_decay) for part in (used, unused) if part]
