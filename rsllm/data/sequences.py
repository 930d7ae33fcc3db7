"""Windows over event sequences, and their splits. Pure numpy."""

# Axes: E events, U users, R rows, H history, C candidates, I items.

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rsllm.data.hashing import UInt64s, entry, mix64, stream

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
NO_ITEM = -1


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
        return replace(self, history_RH=shuffle(key_R, self.history_RH))

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


def shuffle(keys_R: UInt64s, items_RX: Ints) -> Ints:
    """Each row's items in a random order of its key, padding last."""
    place_RX = stream(keys_R, 0, items_RX.shape[1])
    place_RX[items_RX == NO_ITEM] = np.iinfo(np.uint64).max
    return np.asarray(np.take_along_axis(items_RX, place_RX.argsort(axis=1), axis=1))
