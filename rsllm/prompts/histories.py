"""Histories -> `HistoryBatch`: a pass of each answers as many questions as it has items.

Attention is causal, so the state at an item knows the items up to it and nothing later: it is that
of a prompt which ends there.

Axes: B prompts, T tokens, M items of a prompt, N labels, J rivals, I items of the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsllm.prompts.collate import PADDING, OnDevice, Row, padded, table_rows
from rsllm.prompts.encode import History, PromptEncoder


@dataclass(frozen=True, slots=True)
class Asked(OnDevice):
    """Which items came when, and what the next one has to be told from."""

    past_BM: Tensor
    """The items of each history, PADDING behind the last."""
    next_BM: Tensor
    """The item that came after each."""
    table_B: Tensor
    """Which item table each history's vectors are taken from."""
    rivals_J: Tensor
    """The items that others are told from, without repeats; they hold every item of the step."""
    log_share_J: Tensor
    """Log of how often each rival is expected among them, 0 where all items are rivals."""
    per_batch: float
    """Next items of the global batch / number of micro-batches it is split into."""

    @property
    def num_tokens(self) -> int:
        """Items that something is made of, where no language model reads any."""
        return int((self.past_BM != PADDING).sum())

    @property
    def last_B(self) -> Tensor:
        """Place of each history's last item."""
        return (self.past_BM != PADDING).sum(1) - 1


@dataclass(frozen=True, slots=True)
class HistoryBatch(OnDevice):
    """What one forward pass over histories needs, for one representation."""

    asked: Asked
    ids_BT: Tensor
    item_BT: Tensor
    """Row of the stacked item tables at slots, MARKER at markers, NO_ITEM elsewhere."""
    real_BT: Tensor
    """False on padding, which stands behind each prompt."""
    start_BM: Tensor
    """Place of each item's first token in its row."""
    end_BM: Tensor
    """Place of each item's last token in its row, 0 behind the last item."""
    name_end_BM: Tensor
    """Place of the last token of each item's name; of its slot, where that is all there is."""
    label_N: Tensor
    """The tokens of each item's name but the first item's, each with the terminator."""
    label_state_N: Tensor
    """Flat place (row * T + token) of the state that predicts each label."""
    tokens_per_batch: float
    """Labels of the global batch / number of micro-batches it is split into."""

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int(self.real_BT.sum())

    @property
    def num_targets(self) -> int:
        """Next items that are asked for."""
        return int((self.asked.next_BM != PADDING).sum())


@dataclass(frozen=True, slots=True)
class Whole:
    """What every micro-batch of a step is told of the step, so that parts add up to the whole."""

    rivals_J: np.ndarray
    log_share_J: np.ndarray
    num_next: float
    """Next items of the step / number of its micro-batches, over all workers."""
    num_labels: float
    """Labels of the step / number of its micro-batches."""

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        encoder: PromptEncoder | None,
        counts_I: np.ndarray,
        *,
        sampled: bool = False,
        parts: int = 1,
    ) -> Whole:
        """From all rows of a step.

        Args:
            rows: of all workers and micro-batches; of each, what fits into a prompt counts.
            encoder: of history prompts; None where nothing is read.
            counts_I: training interactions of each item.
            sampled: whether rivals are the items of the rows, and not all there are.
            parts: micro-batches that the rows are split into, over all workers.
        """
        histories = [_read(row, encoder) for row in rows]
        items = [item for own in histories for item in own] + [row.target for row in rows]
        rivals_J, log_share_J = np.arange(len(counts_I)), np.zeros(len(counts_I))
        if sampled:
            rivals_J = np.unique(items)
            share_J = np.maximum(counts_I[rivals_J], 1) / counts_I.sum()
            log_share_J = np.log(-np.expm1(len(items) * np.log1p(-share_J)))
        named = (item for own in histories for item in own[1:])
        labels = sum(_num_labels(item, encoder) for item in named) if encoder else 0
        num_next = sum(map(len, histories))
        return cls(rivals_J, log_share_J, num_next / parts, max(1, labels) / parts)

    def asked(self, rows: Sequence[Row], encoder: PromptEncoder | None = None) -> Asked:
        """What some of its rows are asked, as far back as they can be read."""
        histories = [_read(row, encoder) for row in rows]
        width = max(map(len, histories))
        following = [[*own[1:], row.target] for own, row in zip(histories, rows, strict=True)]
        return Asked(
            past_BM=padded(histories, width, PADDING),
            next_BM=padded(following, width, PADDING),
            table_B=torch.tensor([row.table for row in rows]),
            rivals_J=torch.from_numpy(self.rivals_J).long(),
            log_share_J=torch.from_numpy(self.log_share_J).float(),
            per_batch=self.num_next,
        )


def collate_histories(
    rows: Sequence[Row], encoder: PromptEncoder, num_items: int, whole: Whole
) -> HistoryBatch:
    """Encode histories and lay them out, right-padded.

    Args:
        rows: each a history and the item that came next; candidates are not read.
        encoder: of history prompts.
        num_items: of the catalogue.
        whole: the step that they are of.
    """
    prompts = [encoder.history(row.history, row.template) for row in rows]
    asked = whole.asked(rows, encoder)
    length, width = max(len(p.tokens) for p in prompts), asked.past_BM.shape[1]
    labels, places = zip(*map(_labels, prompts, rows, [encoder] * len(rows)), strict=True)
    return HistoryBatch(
        asked=asked,
        ids_BT=padded([p.tokens.ids for p in prompts], length, encoder.terminator),
        item_BT=table_rows([p.tokens for p in prompts], asked.table_B * num_items, length),
        real_BT=torch.arange(length) < torch.tensor([[len(p.tokens)] for p in prompts]),
        start_BM=padded([p.starts for p in prompts], width, 0),
        end_BM=padded([p.ends for p in prompts], width, 0),
        name_end_BM=padded(list(map(_name_ends, prompts, rows, [encoder] * len(rows))), width, 0),
        label_N=torch.tensor([label for own in labels for label in own], dtype=torch.long),
        label_state_N=torch.tensor(
            [row * length + at for row, own in enumerate(places) for at in own], dtype=torch.long
        ),
        tokens_per_batch=whole.num_labels,
    )


def _read(row: Row, encoder: PromptEncoder | None) -> Sequence[int]:
    """What of a row's history a prompt holds; all of it where nothing is read."""
    return encoder.fitting(row.history, row.template) if encoder else row.history


def _num_labels(item: int, encoder: PromptEncoder) -> int:
    return len(encoder.title_ids[item]) + 1 if encoder.named else 0


def _name_ends(prompt: History, row: Row, encoder: PromptEncoder) -> list[int]:
    return [
        start + size - 2 if (size := _num_labels(item, encoder)) else end
        for item, start, end in zip(_read(row, encoder), prompt.starts, prompt.ends, strict=True)
    ]


def _labels(prompt: History, row: Row, encoder: PromptEncoder) -> tuple[list[int], list[int]]:
    """The name and the terminator of each item but the first, and where each is predicted.

    A name's first token is predicted before its item, the terminator at the name's last token.
    """
    labels: list[int] = []
    places: list[int] = []
    for item, start in zip(_read(row, encoder)[1:], prompt.starts[1:], strict=True):
        if size := _num_labels(item, encoder):
            labels += [*encoder.title_ids[item], encoder.terminator]
            places += range(start - 1, start - 1 + size)
    return labels, places
