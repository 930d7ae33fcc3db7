"""Candidate sets, drawn by the random key of each row. Pure numpy."""

# Axes: R rows, H history, C candidates, N negatives, X items of a row, P a row's own pool, T titles
# to draw from, J draws.

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsllm.data.hashing import UInt64s, entry, mix64, stream, unit
from rsllm.data.sequences import NO_ITEM, SPLITS, Bools, Catalogue, Ints, Split, shuffle
from rsllm.errors import DataError

Sampling = Literal["uniform", "popularity", "full"]
ROWS_AT_ONCE, CELLS_AT_ONCE = 1 << 14, 1 << 22
SPARE_DRAWS = 8


def row_keys(
    seed: int, split: Split, user_R: Ints, position_R: Ints, draw: int | NDArray[np.integer]
) -> UInt64s:
    """The random key of each row's candidates. It depends on which row it is, never on its target.

    `seed` is the data set's (held-out rows) or the stage's (training rows); splits and draws (for
    training rows: epochs) are independent of each other.
    """
    key_R = mix64(np.array([seed * len(SPLITS) + SPLITS.index(split)], np.uint64))
    for part_R in (user_R, position_R, draw):
        key_R = entry(key_R, np.atleast_1d(part_R))
    return key_R


def draw_candidates(
    keys_R: UInt64s,
    history_RH: Ints,
    target_R: Ints,
    catalogue: Catalogue,
    num_candidates: int,
    sampling: Sampling = "uniform",
) -> Ints:
    """Each row's target and its negatives, shuffled; no two bear the same title.

    Negatives are drawn without replacement from the catalogue's representatives, less the titles
    of the target and of the history (padded with -1): uniformly, in proportion to
    `Catalogue.weights`, or all of them. LLaRA (arXiv 2312.02445, its code) draws over item ids, so
    its sets can hold the target's title twice.

    Returns:
        Item numbers, int32 of shape (rows, `num_candidates`). "full" sampling takes as many as
        there are; shorter sets are padded with -1.

    Raises:
        DataError: too few distinct titles.
    """
    full = sampling == "full"
    size = len(catalogue.representatives) if full else num_candidates - 1
    step = max(1, CELLS_AT_ONCE // size) if full else ROWS_AT_ONCE
    chunks = [np.empty((0, size + 1), np.int32)]
    for start in range(0, len(keys_R), step):
        rows = slice(start, start + step)
        seen_RX = np.column_stack([target_R[rows], history_RH[rows]])
        pool = _Pool(keys_R[rows], seen_RX, catalogue, sampling)
        negatives_RN = pool.all() if full else pool.draw(size)
        whole_RC = np.column_stack([target_R[rows], negatives_RN])
        chunks.append(shuffle(mix64(keys_R[rows]), whole_RC))
    candidates_RC = np.concatenate(chunks)
    used = (candidates_RC != NO_ITEM).any(axis=0)
    return candidates_RC[:, used] if full and len(keys_R) else candidates_RC


def draw_from_pools(keys_R: UInt64s, pool_RP: Ints, target_R: Ints, num_candidates: int) -> Ints:
    """Each row's target and negatives drawn evenly from the row's own pool, shuffled.

    A pool has at least `num_candidates` - 1 titles, none of them the target's.
    """
    negatives_RN = shuffle(keys_R, pool_RP)[:, : num_candidates - 1]
    return shuffle(mix64(keys_R), np.column_stack([target_R, negatives_RN]))


class _Pool:
    """The titles that may be negatives of some rows: all but those of the target and history."""

    def __init__(
        self, keys_R: UInt64s, seen_RX: Ints, catalogue: Catalogue, sampling: Sampling
    ) -> None:
        self.keys_R, self.items_T = keys_R, catalogue.representatives
        self.weights_T = catalogue.weights() if sampling == "popularity" else None
        self.size = len(self.items_T)
        # Title key -> place in T; `size` stands for titles that are no negatives, and for padding.
        place_of_key = np.full(int(catalogue.title_keys_I.max()) + 2, self.size, np.int32)
        place_of_key[catalogue.keys(self.items_T)] = np.arange(self.size, dtype=np.int32)
        self.excluded_RX = place_of_key[catalogue.keys(seen_RX)]

    def draw(self, size: int) -> Ints:
        """Draw titles one after another, refusing excluded and repeated ones."""
        history = self.excluded_RX.shape[1] - 1
        num_draws = 2 * size + history + SPARE_DRAWS
        drawn_RJ = self._places(stream(self.keys_R, 0, num_draws))
        seen_RJ = np.logical_or.reduce([drawn_RJ == x_R[:, None] for x_R in self.excluded_RX.T])
        good_RJ = ~(_repeats(drawn_RJ) | seen_RJ)
        number_RJ = good_RJ.cumsum(axis=1)
        good_RJ &= number_RJ <= size
        missing_R = number_RJ[:, -1] < size
        out_RN = np.empty((len(drawn_RJ), size), np.int32)
        out_RN[~missing_R] = drawn_RJ[~missing_R][good_RJ[~missing_R]].reshape(-1, size)
        parts = 1 + missing_R.sum() * self.size // CELLS_AT_ONCE
        for rows in np.array_split(np.flatnonzero(missing_R), parts):
            chosen_RJ = np.where(good_RJ[rows], drawn_RJ[rows], self.size)
            out_RN[rows] = self._race(rows, chosen_RJ, num_draws)[:, :size]
        if (out_RN == self.size).any():
            raise DataError(
                f"{self.size} distinct titles are too few for sets of {size + 1} and a history of"
                f" {history}; lower data.num_candidates or data.window"
            )
        return self.items_T[out_RN]

    def all(self) -> Ints:
        """Every title that is not excluded, then padding."""
        rows, none = np.arange(len(self.keys_R)), np.full((len(self.keys_R), 1), self.size)
        return np.append(self.items_T, np.int32(NO_ITEM))[self._race(rows, none, 0)]

    def _places(self, bits: UInt64s) -> Ints:
        if self.weights_T is None:
            high = bits >> np.uint64(32)
            return (high * np.uint64(self.size) >> np.uint64(32)).astype(np.int32)
        total_T = self.weights_T.cumsum()
        return np.asarray(np.searchsorted(total_T, unit(bits) * total_T[-1], "right"), np.int32)

    def _race(self, rows: NDArray[np.integer], chosen_RJ: Ints, start: int) -> Ints:
        """The chosen titles, then the others in the order in which drawing on would give them.

        Weighted sampling without replacement as a race of exponential clocks (Efraimidis and
        Spirakis 2006). Excluded titles come last, as `size`.
        """
        clock_RT = -np.log(unit(stream(self.keys_R[rows], start, self.size + 1)))
        if self.weights_T is not None:
            clock_RT[:, :-1] /= self.weights_T
        np.put_along_axis(clock_RT, chosen_RJ, -1.0, axis=1)
        np.put_along_axis(clock_RT, self.excluded_RX[rows], np.inf, axis=1)
        clock_RT[:, self.size] = np.inf
        order_RT = clock_RT.argsort(axis=1, kind="stable").astype(np.int32)
        order_RT[np.isinf(np.take_along_axis(clock_RT, order_RT, axis=1))] = self.size
        return order_RT[:, : self.size]


def _repeats(drawn_RJ: Ints) -> Bools:
    """True where a row's value stood in an earlier column."""
    order_RJ = drawn_RJ.argsort(axis=1, kind="stable")
    sorted_RJ = np.take_along_axis(drawn_RJ, order_RJ, axis=1)
    repeated_RJ = np.zeros(drawn_RJ.shape, bool)
    np.put_along_axis(repeated_RJ, order_RJ[:, 1:], sorted_RJ[:, 1:] == sorted_RJ[:, :-1], axis=1)
    return repeated_RJ
