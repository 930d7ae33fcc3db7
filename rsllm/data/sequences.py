"""Windows over event sequences, their splits, and seeded candidate sets. Pure numpy."""

# Axes: E events, U users, R rows, H history, C candidates, I items, T titles to draw from.

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rsllm.data.hashing import UInt64s, entry, mix64, stream, unit
from rsllm.errors import DataError

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]
Sampling = Literal["uniform", "popularity", "full"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
NO_ITEM = -1
ROWS_AT_ONCE = 1 << 14
CELLS_AT_ONCE = 1 << 22
SPARE_DRAWS = 8


@dataclass(frozen=True)
class Events:
    """Interactions, each user's contiguous and in order."""

    user_E: Ints
    item_E: Ints
    time_E: NDArray[np.int64]
    """Milliseconds since 1970."""

    def take(self, index: NDArray[np.integer] | Bools | slice) -> Events:
        """Return the events at `index`, or where a mask is true."""
        return Events(self.user_E[index], self.item_E[index], self.time_E[index])


@dataclass(frozen=True)
class Catalogue:
    """The items that bear equal titles (letter case aside), and how often each trains.

    Attributes:
        title_keys_I: the number of each item's distinct title, in order of first appearance.
        representatives: the first item of each distinct title that may be a negative. [T]
        counts_I: training interactions of each item.
    """

    title_keys_I: Ints
    representatives: Ints
    counts_I: NDArray[np.int64]

    @classmethod
    def of(
        cls, titles: Sequence[str], counts_I: NDArray[np.int64], *, cold: bool = True
    ) -> Catalogue:
        """Number the distinct titles of a catalogue; without `cold` only trained items count."""
        keys: dict[str, int] = {}
        folded = (unicodedata.normalize("NFC", title.casefold()) for title in titles)
        title_keys_I = np.array([keys.setdefault(t, len(keys)) for t in folded], np.int32)
        eligible = np.flatnonzero((counts_I > 0) | cold).astype(np.int32)
        first = np.unique(title_keys_I[eligible], return_index=True)[1]
        return cls(title_keys_I, eligible[first], counts_I)

    def keys(self, items: Ints) -> Ints:
        """Return the title of each item; padding stays."""
        return np.where(items >= 0, self.title_keys_I[items], np.int32(NO_ITEM))

    def weights(self) -> NDArray[np.float64]:
        """Training interactions of each representative's title, plus one. [T]"""
        totals = np.bincount(self.title_keys_I, self.counts_I)
        return np.asarray(totals[self.title_keys_I[self.representatives]] + 1.0, np.float64)


@dataclass(frozen=True)
class Rows:
    """Next-item tasks: a user's history, the item that came next, and a candidate set.

    Attributes:
        user_R: user numbers.
        position_R: how many interactions of the user precede the target.
        history_RH: the items before the target, oldest first, left-aligned, padded with -1.
        length_R: items in each history.
        target_R: the items that came next.
        time_R: when the target happened, in milliseconds since 1970 (int64).
        candidates_RC: shuffled candidates with the target among them; None for training rows,
            whose candidates are drawn anew each epoch.
        pool_RP: the titles that a training row's negatives are drawn from, padded with -1; None
            for the whole catalogue.
    """

    user_R: Ints
    position_R: Ints
    history_RH: Ints
    length_R: Ints
    target_R: Ints
    time_R: NDArray[np.int64]
    candidates_RC: Ints | None = None
    pool_RP: Ints | None = None

    def __len__(self) -> int:
        return len(self.target_R)

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_] | slice) -> Rows:
        """Return the rows at `index` (or where a mask is true), in its order."""
        arrays: list[Any] = [None if a is None else a[index] for a in vars(self).values()]
        return Rows(*arrays)

    def shuffled(self, seed: int) -> Rows:
        """Return the same rows, each history in a random order that depends on which row it is."""
        key_R = entry(entry(mix64(np.array([seed], np.uint64)), self.user_R), self.position_R)
        return replace(self, history_RH=_shuffle(key_R, self.history_RH))

    def histories(self, i: int) -> Ints:
        """Row i's history without padding, oldest first."""
        return np.asarray(self.history_RH[i, : self.length_R[i]])


def windows(events: Events, window: int) -> Rows:
    """One row per event: it is the target, the up to `window` items before it the history."""
    user_E, item_E = events.user_E, events.item_E
    event_E = np.arange(len(user_E), dtype=np.int32)
    is_first_E = np.diff(user_E, prepend=NO_ITEM) != 0
    position_E = event_E - np.maximum.accumulate(np.where(is_first_E, event_E, 0))
    length_E = np.minimum(position_E, window)
    step_H = np.arange(window, dtype=np.int32)
    source_EH = np.minimum((event_E - length_E)[:, None] + step_H, max(len(item_E) - 1, 0))
    history_EH = np.where(step_H < length_E[:, None], item_E[source_EH], np.int32(NO_ITEM))
    return Rows(user_E, position_E, history_EH, length_E, item_E, events.time_E)


def split_sizes(num_users: int, train_share: float) -> dict[Split, int]:
    """Users per split, which take them in order of their first interaction.

    Training takes `train_share` of the users, rounded down; the rest is halved, and test gets
    the odd one. On MovieLens-100K with 0.8: 754, 94 and 95, as in LLaRA (arXiv 2312.02445).
    """
    train = int(train_share * num_users + 1e-9)
    validation = (num_users - train) // 2
    return {"train": train, "validation": validation, "test": num_users - train - validation}


def user_targets(events: Events, split_U: Ints) -> Ints:
    """The split that each event is a target of (-1: none), when every user belongs to one split.

    All events of a training user are targets, and only the last one of the others (LLaRA).
    """
    split_E = split_U[events.user_E]
    return np.where((split_E == 0) | (from_end(events) == 0), split_E, np.int32(NO_ITEM))


def leave_one_out_targets(events: Events) -> Ints:
    """Each user's last event tests, the one before validates; users with fewer than 3 train."""
    from_end_E = from_end(events)
    _, number_E, size_U = np.unique(events.user_E, return_inverse=True, return_counts=True)
    split_E = np.select([from_end_E == 0, from_end_E == 1], [2, 1], 0)
    return np.where(size_U[number_E] >= 3, split_E, 0).astype(np.int32)


def time_targets(events: Events, validation_from: int, test_from: int) -> Ints:
    """Events before the first cut train; each user's first one after a cut is held out."""
    period_E = (events.time_E >= validation_from).astype(np.int32) + (events.time_E >= test_from)
    starts_E = np.diff(events.user_E, prepend=NO_ITEM) != 0
    first_E = starts_E | (np.diff(period_E, prepend=0) != 0)
    return np.where((period_E == 0) | first_E, period_E, NO_ITEM).astype(np.int32)


def from_end(events: Events) -> NDArray[np.int64]:
    """How many events of the same user follow each event."""
    event_E = np.arange(len(events.user_E))
    last_E = np.diff(events.user_E, append=NO_ITEM) != 0
    end_E = np.minimum.accumulate(np.where(last_E, event_E, len(event_E))[::-1])[::-1]
    return end_E - event_E


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
        chunks.append(_shuffle(mix64(keys_R[rows]), whole_RC))
    candidates_RC = np.concatenate(chunks)
    used = (candidates_RC != NO_ITEM).any(axis=0)
    return candidates_RC[:, used] if full and len(keys_R) else candidates_RC


def draw_from_pools(keys_R: UInt64s, pool_RP: Ints, target_R: Ints, num_candidates: int) -> Ints:
    """Each row's target and negatives drawn evenly from the row's own pool, shuffled.

    A pool has at least `num_candidates` - 1 titles, none of them the target's.
    """
    negatives_RN = _shuffle(keys_R, pool_RP)[:, : num_candidates - 1]
    return _shuffle(mix64(keys_R), np.column_stack([target_R, negatives_RN]))


def _shuffle(keys_R: UInt64s, items_RX: Ints) -> Ints:
    """Each row's items in a random order of its key, padding last."""
    place_RX = stream(keys_R, 0, items_RX.shape[1])
    place_RX[items_RX == NO_ITEM] = np.iinfo(np.uint64).max
    return np.asarray(np.take_along_axis(items_RX, place_RX.argsort(axis=1), axis=1))


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
        good_RJ = ~(_repeats(drawn_RJ) | _is_in(drawn_RJ, self.excluded_RX))
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


def _is_in(values_RJ: Ints, sets_RX: Ints) -> Bools:
    return np.asarray(np.logical_or.reduce([values_RJ == x_R[:, None] for x_R in sets_RX.T]))
