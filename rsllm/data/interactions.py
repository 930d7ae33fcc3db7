"""Raw interactions to numbered, filtered events. Pure table functions, independent of row order."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rsllm.errors import DataError

UInt64s = NDArray[np.uint64]


def to_events(
    interactions: pd.DataFrame, items: pd.DataFrame, *, min_rating: float, seed: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Filter the interactions, drop duplicates and number users and items.

    Items are numbered in catalogue order; users in the order of their first kept interaction.

    Args:
        interactions: columns user, item, rating, time, in any order of rows.
        items: column id; every item of `interactions` is in it.
        min_rating: lower ratings are dropped.
        seed: of the hash that orders what happened at the same time.

    Returns:
        Events, ordered by user, then time, then the hash `tie` (columns user int32, item int32,
        time int64, tie uint64), and the number of interactions read, dropped and kept.

    Raises:
        DataError: no interaction is left.
    """
    rated = interactions[interactions["rating"] >= min_rating]
    events = rated.drop_duplicates(["user", "item", "time"])
    if events.empty:
        raise DataError(
            f"none of {len(interactions):,} interactions is rated data.min_rating = {min_rating:g}"
            f" or more (highest: {interactions['rating'].max():g}); lower it"
        )
    counts = {
        "read": len(interactions),
        "below_min_rating": len(interactions) - len(rated),
        "duplicates": len(rated) - len(events),
        "kept": len(events),
    }
    return in_order(_numbered(events, items, seed)), counts


def _numbered(events: pd.DataFrame, items: pd.DataFrame, seed: int) -> pd.DataFrame:
    user_hash, item_hash = stable_hash(events["user"], seed), stable_hash(events["item"], seed)
    return pd.DataFrame(
        {
            "user": _user_numbers(events, user_hash),
            "item": pd.Index(items["id"]).get_indexer(events["item"]).astype(np.int32),
            "time": events["time"].to_numpy(np.int64),
            "tie": _mix(user_hash + _mix(item_hash)),
        }
    )


def _user_numbers(events: pd.DataFrame, user_hash: UInt64s) -> NDArray[np.int32]:
    codes, users = pd.factorize(events["user"])
    first = events.groupby(codes)["time"].min().to_numpy(np.int64)
    tie = np.empty(len(users), np.uint64)
    tie[codes] = user_hash
    numbers = np.empty(len(users), np.int32)
    numbers[np.lexsort((tie, first))] = np.arange(len(users), dtype=np.int32)
    return numbers[codes]


def in_order(events: pd.DataFrame) -> pd.DataFrame:
    """The events sorted by user, time and tie."""
    order = np.lexsort((events["tie"], events["time"], events["user"]))
    return events.iloc[order].reset_index(drop=True)


def stable_hash(values: pd.Series[str], seed: int) -> UInt64s:
    """A 64-bit hash of each string, the same on every machine and in every process."""
    codes, distinct = pd.factorize(values)
    digests = [
        hashlib.blake2b(f"{seed}:{value}".encode(), digest_size=8).digest() for value in distinct
    ]
    return np.frombuffer(b"".join(digests), np.dtype("<u8")).astype(np.uint64)[codes]


def _mix(bits: UInt64s) -> UInt64s:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), a bijection."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
