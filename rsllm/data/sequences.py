"""Windows over event sequences, the split of users, and seeded candidate sets. Pure numpy."""

# Axes: E events, R rows, H history, C candidates, I items.

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rsllm.errors import DataError

Ints = NDArray[np.int32]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
NO_ITEM = -1


@dataclass(frozen=True)
class Catalogue:
    """Which items bear equal titles (letter case aside).

    Attributes:
        title_keys_I: the number of each item's distinct title, in order of first appearance.
        representatives: the first item of each distinct title.
    """

    title_keys_I: Ints
    representatives: Ints

    @classmethod
    def of(cls, titles: Sequence[str]) -> Catalogue:
        """Number the distinct titles of a catalogue."""
        keys: dict[str, int] = {}
        folded = (unicodedata.normalize("NFC", title.casefold()) for title in titles)
        title_keys_I = np.array([keys.setdefault(t, len(keys)) for t in folded], np.int32)
        return cls(title_keys_I, np.unique(title_keys_I, return_index=True)[1].astype(np.int32))


@dataclass(frozen=True)
class Rows:
    """Next-item tasks: a user's history, the item that came next, and a candidate set.

    Attributes:
        user_R: user numbers.
        position_R: how many interactions of the user precede the target.
        history_RH: the items before the target, oldest first, left-aligned, padded with -1.
        length_R: items in each history.
        target_R: the items that came next.
        time_R: when the target happened, in seconds since 1970 (int64).
        candidates_RC: shuffled candidates with the target among them; None for training rows,
            whose candidates are drawn anew each epoch.
    """

    user_R: Ints
    position_R: Ints
    history_RH: Ints
    length_R: Ints
    target_R: Ints
    time_R: NDArray[np.int64]
    candidates_RC: Ints | None = None

    def __len__(self) -> int:
        return len(self.target_R)

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> Rows:
        """The rows at `index` (or where a mask is true), in its order."""
        taken: dict[str, Any] = {
            name: None if array is None else array[index] for name, array in vars(self).items()
        }
        return Rows(**taken)

    def histories(self, i: int) -> Ints:
        """Row i's history without padding, oldest first."""
        history: Ints = self.history_RH[i, : self.length_R[i]]
        return history


def windows(user_E: Ints, item_E: Ints, time_E: NDArray[np.int64], window: int) -> Rows:
    """One row per event: the event is the target, the up to `window` items before it the history.

    Args:
        user_E: user numbers; each user's events are contiguous and in order of time.
        item_E: item numbers.
        time_E: seconds since 1970.
        window: longest history.
    """
    event_E = np.arange(len(user_E), dtype=np.int32)
    is_first_E = np.diff(user_E, prepend=NO_ITEM) != 0
    position_E = event_E - np.maximum.accumulate(np.where(is_first_E, event_E, 0))
    length_E = np.minimum(position_E, window)
    step_H = np.arange(window, dtype=np.int32)
    source_EH = (event_E - length_E)[:, None] + step_H
    history_EH = np.where(
        step_H < length_E[:, None],
        item_E[np.minimum(source_EH, max(len(item_E) - 1, 0))],
        np.int32(NO_ITEM),
    )
    return Rows(user_E, position_E, history_EH, length_E, item_E, time_E)


def last_of_each_user(rows: Rows) -> Rows:
    """The row of each user's last interaction; `rows` as `windows` makes them."""
    return rows.take(np.diff(rows.user_R, append=NO_ITEM) != 0)


def split_sizes(num_users: int, train_share: float) -> dict[Split, int]:
    """Users per split, which take them in order of their first interaction.

    Training takes `train_share` of the users, rounded down; the rest is halved, and test gets
    the odd one. On MovieLens-100K with 0.8: 754, 94 and 95, as in LLaRA (arXiv 2312.02445).
    """
    train = int(train_share * num_users + 1e-9)
    validation = (num_users - train) // 2
    return {"train": train, "validation": validation, "test": num_users - train - validation}


def candidate_rng(
    seed: int, split: Split, user: int, position: int, epoch: int
) -> np.random.Generator:
    """The generator of one row's candidates. It depends on which row it is, never on its target."""
    return np.random.default_rng([seed, SPLITS.index(split), user, position, epoch])


def draw_candidates(
    rng: np.random.Generator,
    history: Ints,
    target: int,
    catalogue: Catalogue,
    num_candidates: int,
) -> Ints:
    """The target and `num_candidates - 1` negatives, shuffled; no two bear the same title.

    Negatives are uniform without replacement over the catalogue's representatives, less the
    titles of the target and of the history. LLaRA (arXiv 2312.02445, its code) draws over item
    ids, so its sets can hold the target's title twice.

    Args:
        rng: the row's generator, see `candidate_rng`.
        history: item numbers without padding.
        target: item number.
        catalogue: all items.
        num_candidates: size of the set.

    Returns:
        Item numbers, int32 of shape (num_candidates,).

    Raises:
        DataError: too few distinct titles.
    """
    keys = catalogue.title_keys_I
    excluded = np.array(sorted({int(keys[target]), *keys[history].tolist()}))
    allowed = len(catalogue.representatives) - len(excluded)
    if allowed < num_candidates - 1:
        raise DataError(
            f"{len(catalogue.representatives)} distinct titles leave {allowed} negatives for a"
            f" history of {len(history)}; lower data.num_candidates = {num_candidates}"
        )
    rank = rng.choice(allowed, num_candidates - 1, replace=False)
    # The r-th key that is not excluded: r, moved up by the excluded keys at or below it.
    negative_keys = rank + np.searchsorted(excluded - np.arange(len(excluded)), rank, "right")
    candidates_C = np.append(catalogue.representatives[negative_keys], np.int32(target))
    rng.shuffle(candidates_C)
    return candidates_C
