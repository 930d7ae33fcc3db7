"""64-bit hashes that are the same on every machine, in every process and for all time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

UInt64s = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_strings(values: ArrayLike | pd.Series[str], seed: int) -> UInt64s:
    """A seeded hash of each string (SipHash, Aumasson and Bernstein 2012, as pandas has it)."""
    strings = np.asarray(values, dtype=object)
    hashes: Any = pd.util.hash_array(strings, hash_key=f"{seed:016x}"[-16:])
    return np.asarray(hashes, np.uint64)


def stream_seed(seed: int, stream: str) -> int:
    """A 32-bit seed of its own for each stream of random numbers under one seed, by its name."""
    return int(hash_strings([stream], seed)[0] >> np.uint64(32))


def mix64(bits: UInt64s) -> UInt64s:
    """Apply the output function of SplitMix64 (Steele, Lea and Flood 2014), a bijection."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def entry(keys: UInt64s, number: NDArray[np.integer]) -> UInt64s:
    """One number, counted from 0, of each key's SplitMix64 stream."""
    return mix64(keys + (number.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def stream(keys_R: UInt64s, start: int, size: int) -> UInt64s:
    """Return numbers `start` to `start + size` of each key's SplitMix64 stream. [R, size]."""
    return entry(keys_R[:, None], np.arange(start, start + size))


def unit(bits: UInt64s) -> NDArray[np.float64]:
    """Uniform in (0, 1)."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
