"""Training interactions as one sequence a user, cut into windows that move from epoch to epoch.

A window of m + 1 items asks m questions: what comes after its first item, its second, and so on.
"""

# Axes: R training rows, E items of all sequences, S sequences, W windows.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsllm.data.hashing import entry, mix64
from rsllm.data.sequences import Ints, Rows


@dataclass(frozen=True)
class Histories:
    """Sequences of items, each cut into windows that ask for every item but the first once.

    Attributes:
        item_E: the items of all sequences, one sequence after the other.
        start_S: where each begins.
        user_S: whose it is.
        longest: items of a window that ask for the one after them, at most.
    """

    item_E: Ints
    start_S: NDArray[np.int64]
    user_S: Ints
    longest: int

    @classmethod
    def of(cls, rows: Rows, longest: int) -> Histories:
        """Put training rows together again: rows of a user at successive positions are one."""
        order = np.lexsort((rows.position_R, rows.user_R))
        user_R, position_R = rows.user_R[order], rows.position_R[order]
        follows_R = (np.diff(user_R, prepend=-1) == 0) & (np.diff(position_R, prepend=-1) == 1)
        begins_R = np.flatnonzero(~follows_R)
        # A sequence is the history of its first row, and then every row's target.
        targets = np.split(rows.target_R[order], begins_R[1:])
        past = [rows.histories(int(row)) for row in order[begins_R]]
        parts = [np.concatenate(both) for both in zip(past, targets, strict=True)]
        ends = np.cumsum([0, *map(len, parts)])
        return cls(np.concatenate(parts), ends[:-1], user_R[begins_R], longest)

    @property
    def size_S(self) -> NDArray[np.int64]:
        """How many items each sequence asks for: all but its first."""
        return np.diff(self.start_S, append=len(self.item_E)) - 1

    @property
    def first_S(self) -> NDArray[np.int64]:
        """The number of each sequence's first window, and behind them that of all windows."""
        return np.concatenate([[0], np.cumsum(-(-self.size_S // self.longest))])

    def __len__(self) -> int:
        """How many windows an epoch has, the same for every epoch."""
        return int(self.first_S[-1])

    def windows(
        self, places: Sequence[tuple[int, int]], seed: int
    ) -> list[tuple[int, Ints, np.uint64]]:
        """Return the windows at (epoch, number): user, items, and a random key of their own.

        Where a sequence does not fill its windows, how much of the room its first one leaves free
        is drawn anew each epoch, so that cuts fall elsewhere.
        """
        epoch_W, number_W = np.array(places).T
        first_S, size_S = self.first_S, self.size_S
        sequence_W = np.searchsorted(first_S, number_W, "right") - 1
        place_W = number_W - first_S[sequence_W]
        count_W = np.diff(first_S)[sequence_W]
        key_W = entry(entry(mix64(np.array([seed], np.uint64)), sequence_W), epoch_W)
        room_W = count_W * self.longest - size_S[sequence_W]
        shift_W = (key_W % (room_W + 1).astype(np.uint64)).astype(np.int64)
        shift_W[count_W == 1] = 0
        begin_W = np.maximum(place_W * self.longest - shift_W, 0)
        end_W = np.minimum((place_W + 1) * self.longest - shift_W, size_S[sequence_W])
        own_W = entry(key_W, place_W)
        starts_W = self.start_S[sequence_W]
        return [
            (int(self.user_S[sequence]), self.item_E[start + begin : start + end + 1], key)
            for sequence, start, begin, end, key in zip(
                sequence_W, starts_W, begin_W, end_W, own_W, strict=True
            )
        ]
