"""What the steps of a language-model stage see: pure functions of seed, step and worker."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from rsllm.config import StageConfig
from rsllm.data.candidates import draw_candidates, draw_from_pools, row_keys
from rsllm.data.hashing import stream_seed
from rsllm.data.histories import Histories
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.evaluate.rank import decision
from rsllm.prompts.collate import Batch, Row, answer_tokens, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.prompts.histories import HistoryBatch, Whole, collate_histories

GOLDEN_RATIO = (5**0.5 - 1) / 2
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
        size, target_B = config["num_candidates"], rows.target_R
        if rows.pool_RP is None:
            how = (self.data.catalogue, size, config["candidates"])
            candidates_BC = draw_candidates(keys_B, rows.history_RH, target_B, *how)
        else:
            candidates_BC = draw_from_pools(keys_B, rows.pool_RP, target_B, size)
        rows = replace(rows, candidates_RC=candidates_BC)
        tables = 1 + rows.user_R % self.folds if self.folds else np.zeros_like(rows.user_R)
        chosen = zip((keys_B >> np.uint64(48)).tolist(), tables.tolist(), strict=True)
        return [
            replace(decision(rows, i), template=template, table=table)
            for i, (template, table) in enumerate(chosen)
        ]

    @property
    def num_users(self) -> int:
        """Whose rows they are."""
        return len(np.unique(self.rows.user_R))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.rows)

    def micro_batches(
        self, rows: Sequence[Row], parts: Sequence[Sequence[Row]], all_branches: bool, world: int
    ) -> list[Any]:
        """One worker's `parts` of a step's rows, encoded."""
        tokens = answer_tokens([row.target for row in rows], self.encoder)
        return [
            collate(
                own,
                self.encoder,
                self.data.catalogue.title_keys_I,
                all_branches=all_branches,
                tokens_per_batch=tokens / (world * len(parts)),
            )
            for own in parts
        ]

    def length(self, row: Row, all_branches: bool) -> int:
        """Tokens of a row, in its prompt and its branches."""
        answers = self.encoder.answers(row.candidates) if all_branches else []
        branches = sum(len(answer + self.encoder.ending) - 1 for answer in answers)
        return branches + self.encoder.length(row.history, row.candidates, row.template)


@dataclass(frozen=True, slots=True)
class HistorySet:
    """The training sequences of one data set as history prompts, and its weight in the mixture."""

    data: PreparedData
    histories: Histories
    encoder: PromptEncoder
    weight: float
    folds: int = 0
    """See `TrainingSet`."""
    sampled: bool = False
    """Whether items are told from those of the same step only."""

    def decisions(self, places: Sequence[tuple[int, int]], seed: int) -> list[Row]:
        """Windows at (epoch, number), as histories and what came next."""
        return window_rows(self.histories, places, seed, self.folds)

    @property
    def num_users(self) -> int:
        """Whose sequences they are."""
        return len(np.unique(self.histories.user_S))

    def __len__(self) -> int:
        """Windows of an epoch."""
        return len(self.histories)

    def micro_batches(
        self, rows: Sequence[Row], parts: Sequence[Sequence[Row]], all_branches: bool, world: int
    ) -> list[Any]:
        """One worker's `parts` of a step's windows, encoded."""
        counts_I, number = self.data.catalogue.counts_I, world * len(parts)
        whole = Whole.of(rows, self.encoder, counts_I, sampled=self.sampled, parts=number)
        return [collate_histories(own, self.encoder, len(counts_I), whole) for own in parts]

    def length(self, row: Row, all_branches: bool) -> int:
        """Tokens of a prompt."""
        return self.encoder.length(row.history, (), row.template)


def window_rows(
    histories: Histories, places: Sequence[tuple[int, int]], seed: int, folds: int
) -> list[Row]:
    """Windows at (epoch, number), as histories and what came next."""
    return [
        Row(
            history=items[:-1].tolist(),
            candidates=(),
            target=int(items[-1]),
            user=user,
            template=int(key >> np.uint64(48)),
            table=1 + user % folds if folds else 0,
        )
        for user, items, key in histories.windows(places, seed)
    ]


class StepBatches:
    """Maps a step to the micro-batches of one worker, encoded; another process can do it.

    Args:
        stage: its loss, batch size and steps.
        sets: what rows come from; every batch is of one of them.
        text: writes text-only prompts of the first set, for a curriculum.
        seed: of rows, candidates, templates and coins; no two stages have the same.
        rank: of the worker, among `world`.
    """

    def __init__(
        self,
        stage: StageConfig,
        sets: Sequence[TrainingSet | HistorySet],
        text: PromptEncoder | None = None,
        *,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.stage, self.sets, self.text, self.seed = stage, sets, text, seed
        self.rank, self.world = rank, world
        self.num_dropped_elsewhere = 0

    @property
    def num_dropped_items(self) -> int:
        """History items dropped so far to fit, in this process and where batches come from."""
        here = sum(part.encoder.num_dropped_items for part in self.sets)
        return here + self.num_dropped_elsewhere

    @property
    def all_branches(self) -> bool:
        """Whether training needs a branch per candidate."""
        loss = self.stage.loss
        return loss.gamma > 0 and loss.scorer == "likelihood"

    def __call__(self, step: int) -> list[Batch | HistoryBatch]:
        """The worker's micro-batches of a step."""
        number, own_step = mixed_step(self.seed, step, [part.weight for part in self.sets])
        part, (pool, place) = self.sets[number], divmod(own_step, POOL_STEPS)
        rows = _pool(self, number, pool)[place]
        if self.text and text_only(self.seed, step, self.stage.steps):
            part = replace(part, encoder=self.text)
        own, accumulation = rows[self.rank :: self.world], self.stage.accumulation
        parts = [own[i::accumulation] for i in range(accumulation)]
        return part.micro_batches(rows, parts, self.all_branches, self.world)

    def in_turn(self, start: int) -> Iterator[list[Batch | HistoryBatch]]:
        """The batches of a step and of all after it, each made when it is asked for."""
        return map(self, range(start, self.stage.steps))


@lru_cache(maxsize=32)
def _pool(batches: StepBatches, number: int, pool: int) -> list[list[Row]]:
    """The global batches of a pool of steps of one set, each of rows of similar length."""
    stage, seed, part = batches.stage, batches.seed, batches.sets[number]
    steps = range(pool * POOL_STEPS, min((pool + 1) * POOL_STEPS, stage.steps))
    size, num_rows = stage.batch_size, len(part)
    places = [at for step in steps for at in step_rows(seed, step, size, num_rows)]
    rows = part.decisions(places, seed)
    lengths = [part.length(row, batches.all_branches) for row in rows]
    order = by_length(lengths, size, [stream_seed(seed, "pool"), pool], longest_first=pool == 0)
    return [[rows[i] for i in own] for own in order]


@lru_cache(maxsize=4)
def sample_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order in which an epoch visits the rows: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def step_rows(seed: int, step: int, batch_size: int, num_rows: int) -> list[tuple[int, int]]:
    """(epoch, row) of a step's global batch: a pure function, the same for any world size."""
    places = (divmod(p, num_rows) for p in range(step * batch_size, (step + 1) * batch_size))
    return [(epoch, int(sample_order(seed, epoch, num_rows)[at])) for epoch, at in places]


def by_length(
    lengths: Sequence[int], batch_size: int, seed: Sequence[int], *, longest_first: bool = False
) -> np.ndarray:
    """Batches of rows of similar length in a random order: hardly any padding. [steps, batch]

    With the longest one first, a run that has too little memory fails at once.
    """
    batches = np.argsort(lengths, kind="stable").reshape(-1, batch_size)
    order = np.random.default_rng(seed).permutation(len(batches))
    if longest_first:
        order = np.roll(order, -int(np.argmax(order)))
    return batches[order]


def text_only(seed: int, step: int, steps: int) -> bool:
    """LLaRA's curriculum: by chance, from always at the first step to never at the last one.

    The unified prompts' chance is step / steps (arXiv 2312.02445, section 3.3).
    """
    coin = np.random.default_rng([stream_seed(seed, "curriculum"), step])
    return bool(coin.random() >= step / steps)


def mixed_step(seed: int, step: int, weights: Sequence[float]) -> tuple[int, int]:
    """Which data set a step belongs to, and how many earlier steps belong to it too.

    A pure function, so that resuming and other world sizes see the same rows. Steps are dealt out
    by a Kronecker sequence with the golden ratio, so each data set's share of any run of steps is
    within a few steps of its weight.
    """
    bounds = np.cumsum(weights) / np.sum(weights)
    start = np.random.default_rng(stream_seed(seed, "mixture")).random()
    place_S = (start + np.arange(step + 1) * GOLDEN_RATIO) % 1.0
    set_S = np.searchsorted(bounds[:-1], place_S, "right")
    return int(set_S[-1]), int((set_S[:-1] == set_S[-1]).sum())
