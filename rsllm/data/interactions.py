"""One group of users: unordered interactions to ordered, filtered events. Pure functions."""

# Axes: E events, U users of the group, I items.

from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from rsllm.data.hashing import UInt64s, hash_strings, mix64
from rsllm.data.sequences import Bools, Events, Ints, from_end

Duplicates = Literal["event", "first", "last", "keep"]
TIME_BITS = np.uint64(42)
TIME_BINS = 1 << 16


def group_of(users: pa.Array, seed: int, num_groups: int) -> NDArray[np.int64]:
    """The group that each interaction's user belongs to, the same wherever the line stands."""
    encoded = users.dictionary_encode()
    group = hash_strings(encoded.dictionary.to_pandas(), seed) % np.uint64(num_groups)
    return np.asarray(group.astype(np.int64)[np.asarray(encoded.indices)])


def in_order(
    users: pa.Array, item_E: Ints, time_E: NDArray[np.int64], item_hash_I: UInt64s, seed: int
) -> tuple[pa.Array, UInt64s, Events, NDArray[np.int64]]:
    """Number a group's users by hash and order the events of each by time.

    What happened at the same time is ordered by a hash of user and item, so that neither the
    order of the lines nor the item's number decides.

    Returns:
        The users' ids and hashes, the events, and the line that each event comes from.
    """
    encoded = users.dictionary_encode()
    hash_U = hash_strings(encoded.dictionary.to_pandas(), seed)
    by_hash_U = np.lexsort((np.asarray(encoded.dictionary.to_pandas()), hash_U))
    number_U = by_hash_U.argsort().astype(np.int32)
    hash_U = hash_U[by_hash_U]
    user_E = number_U[np.asarray(encoded.indices)]
    assert len(hash_U) < 1 << 22, "a group's user and a time share 64 bits"
    key_E = (user_E.astype(np.uint64) << TIME_BITS) | time_E.astype(np.uint64)
    line_E = key_E.argsort()
    same = np.flatnonzero(np.diff(key_E[line_E]) == 0)
    tied = np.union1d(same, same + 1)
    lines = line_E[tied]
    tie = mix64(hash_U[user_E[lines]] + mix64(item_hash_I[item_E[lines]]))
    line_E[tied] = lines[np.lexsort((item_E[lines], tie, key_E[lines]))]
    events = Events(user_E[line_E], item_E[line_E], time_E[line_E])
    return encoded.dictionary.take(pa.array(by_hash_U)), hash_U, events, line_E


def distinct(events: Events, policy: Duplicates) -> Bools:
    """Return a mask of the ordered events to keep.

    `event` keeps one of equal user, item and time; `first` and `last` one of equal user and item;
    `keep` all.
    """
    pair_E = (events.user_E.astype(np.int64) << 32) | events.item_E
    if policy == "keep":
        return np.ones(len(pair_E), bool)
    if policy == "event":
        same_E = (np.diff(pair_E, prepend=-1) == 0) & (np.diff(events.time_E, prepend=-1) == 0)
    else:
        same_E = pd.Series(pair_E).duplicated(keep=policy).to_numpy()
    return np.asarray(~same_E)


def core(events: Events, kept_I: Bools, min_user_events: int) -> Bools:
    """Events with kept items, of users who have enough of those."""
    keep_E = kept_I[events.item_E]
    size_U = np.bincount(events.user_E[keep_E], minlength=int(events.user_E.max(initial=0)) + 1)
    return keep_E & (size_U[events.user_E] >= min_user_events)


def most_recent(events: Events, number: int) -> Bools:
    """Return the last `number` events of each user; 0 keeps all."""
    return (from_end(events) < number) | (number == 0)


def time_bins(time_E: NDArray[np.int64], earliest: int, latest: int) -> NDArray[np.int64]:
    """Equal parts of the data's span of time (ms, with its last second), from 0."""
    return (time_E - earliest) * TIME_BINS // (latest - earliest + 1000)


def time_cut(counts: NDArray[np.int64], share: float, earliest: int, latest: int) -> int:
    """Return the first time before which at least `share` of the events lie; `counts` per bin."""
    bins = int(np.searchsorted(counts.cumsum(), share * counts.sum(), "left")) + 1
    return earliest + -(-bins * (latest - earliest + 1000) // TIME_BINS)


def user_numbers(first_U: NDArray[np.int64], hash_U: UInt64s, kept_U: Bools) -> Ints:
    """Numbers of all kept users in order of their first interaction, ties by hash; else -1."""
    kept = np.flatnonzero(kept_U)
    number_U = np.full(len(first_U), -1, np.int32)
    order = kept[np.lexsort((hash_U[kept], first_U[kept]))]
    number_U[order] = np.arange(len(order), dtype=np.int32)
    return number_U
