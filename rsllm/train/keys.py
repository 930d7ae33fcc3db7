"""The keys of the catalogue scorer by themselves: what they can do before a language model reads.

Seconds, not minutes: no tokens are read. A language model on history prompts starts from there, and
has to beat it: a control of its own, `keys` among the rules.

Axes: B histories, M items, I items of the catalogue, W windows.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from rsllm.config import Experiment
from rsllm.data.histories import Histories
from rsllm.data.prepared import PreparedData
from rsllm.evaluate import rank
from rsllm.model import tuned
from rsllm.model.catalogue import ItemKeys
from rsllm.prompts.histories import Asked, Whole
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.train.batches import sample_order, window_rows
from rsllm.train.engine import Optimization, ParameterGroup

VALIDATIONS = 2
"""Per epoch."""


class KeysObjective(nn.Module):
    """L_UT at every position, by keys and the shortcut alone."""

    def __init__(self, keys: ItemKeys) -> None:
        super().__init__()
        self.keys = keys

    def forward(self, asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the share of positions whose item comes first."""
        keys_XK: Tensor = self.keys()
        vectors_BMK = self.keys.shortcut(asked, keys_XK)
        part = self.keys.contrast(vectors_BMK, asked.next_BM, keys_XK, asked)
        return part.loss, {"loss": part.loss.detach(), "contrast/user_accuracy": part.accuracy}


class KeysTask:
    """The keys on the windows of all training sequences, until validation stops improving.

    Args:
        experiment: its catalogue scorer, and how long its history prompts are.
        data: the prepared data.
        items: the recommender's item table; None for prompts without slots.
        titles_IF: vectors of titles.
    """

    name = "keys"
    metric = "MRR"

    def __init__(
        self,
        experiment: Experiment,
        data: PreparedData,
        items: ItemEmbeddings | None,
        titles_IF: Tensor,
    ) -> None:
        config = experiment.catalogue
        self.data, self.items, self.titles_IF = data, items, titles_IF
        self.folds = len(items.fold_tables) if items else 0
        self.histories = Histories.of(data.rows("train"), experiment.prompt.history_items)
        self.seed, self.patience = config.seed, config.patience
        self.rows_per_step = min(config.batch_size, len(self.histories))
        self.steps_per_epoch = len(self.histories) // self.rows_per_step
        self.steps = max(1, round(config.max_epochs * self.steps_per_epoch))
        self.validation = data.rows("validation")
        items_XE = items.standardised() if items else None
        self.keys = ItemKeys(items_XE, titles_IF, data.catalogue, config)
        self.objective: nn.Module = KeysObjective(self.keys)
        self.optimization = Optimization(
            groups=[ParameterGroup(list(self.keys.parameters()), config.learning_rate)],
            schedule=lambda step: 1.0,
            micro_batch=self.rows_per_step // dist.get_world_size(),
        )

    def batches(self, step: int) -> list[Asked]:
        """This worker's share of the global batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order_W = sample_order(self.seed, epoch, len(self.histories))
        chosen_W = order_W[place * self.rows_per_step :][: self.rows_per_step]
        places = [(epoch, int(number)) for number in chosen_W]
        rows = window_rows(self.histories, places, self.seed, self.folds)
        whole = Whole.of(rows, None, self.data.catalogue.counts_I, parts=dist.get_world_size())
        own = rows[dist.get_rank() :: dist.get_world_size()]
        return [whole.asked(own)]

    def feed(self, start: int) -> Iterator[list[Asked]]:
        """The batches of a step and of all after it."""
        return map(self.batches, range(start, self.steps))

    def due(self, step: int) -> bool:
        """Several times an epoch: what can be learned here is learned in one or two."""
        return step % max(1, self.steps_per_epoch // VALIDATIONS) == 0

    def validate(self, objective: nn.Module) -> dict[str, float]:
        """Metrics as exact expectations over uniform candidate draws, or else on the drawn sets."""
        score = partial(rank.score_keys, self.keys)
        per_user = rank.catalogue_metrics(score, self.validation, self.data)
        return {name: float(values.mean()) for name, values in per_user.items()}

    def export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Weights, keys, and the vectors that they are made of."""
        trained = {name.removeprefix("keys."): tensor for name, tensor in tensors.items()}
        tuned.save_catalogue(self.keys, trained, self.titles_IF, folder)
        if self.items is not None:
            self.items.save(folder)
