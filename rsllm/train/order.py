"""Which rows a step sees: pure functions of seed and step, the same for any number of workers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

GOLDEN_RATIO = (5**0.5 - 1) / 2


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
    return bool(np.random.default_rng([seed, step]).random() >= step / steps)


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


def shares(rows: Sequence[Any], rank: int, world: int, accumulation: int) -> list[Sequence[Any]]:
    """One worker's micro-batches of a global batch."""
    own = rows[rank::world]
    return [own[i::accumulation] for i in range(accumulation)]


def evenly(step: int, steps: int, times: int) -> bool:
    """Whether `step` is one of `times` evenly spaced steps, the last of which is `steps`."""
    return step in {round(steps * (i + 1) / times) for i in range(times)}
