"""A world with a provable answer: every user walks the same cycle of items."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsllm.errors import ConfigError

_ADJECTIVES = """
    Amber Bitter Broken Crimson Distant Electric Final Frozen Gentle Golden Hidden Hollow Iron
    Little Lonely Lost Midnight Paper Quiet Red Secret Silent Silver Stolen Wild
"""
_NOUNS = """
    Anchor Bridge Canyon Castle Circus Dancer Desert Empire Falcon Forest Garden Harbor Island
    Lantern Letter Meadow Mirror Mountain Orchard Piano River Station Summer Train Winter
"""
_START = 880_000_000
_MINUTE = 60


def write_world(
    folder: Path, *, num_users: int, num_items: int, length: int, seed: int
) -> NDArray[np.int64]:
    """Write a world in GroupLens' layout (`u.data`, `u.item`) to `folder`.

    Each user enters one fixed cycle of all items at a random place, a minute after the user
    before, and walks `length` steps of it, a minute a step; all ratings are 4. So the item after
    any history is known with certainty.

    Returns:
        The cycle: item ids, each followed by the next one in a walk, the last by the first.

    Raises:
        ConfigError: more items than the vocabulary has titles.
    """
    titles = [
        f"{adjective} {noun}" for adjective, noun in product(_ADJECTIVES.split(), _NOUNS.split())
    ]
    if not 1 <= num_items <= len(titles):
        raise ConfigError(f"num_items is {num_items}; choose 1 to {len(titles)}")
    rng = np.random.default_rng(seed)
    rng.shuffle(titles)
    cycle = rng.permutation(num_items) + 1
    entries = rng.integers(num_items, size=num_users)
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "u.item", [_item_line(i, titles[i - 1]) for i in range(1, num_items + 1)])
    walks = [
        _interaction_line(user, int(cycle[(entry + step) % num_items]), step)
        for user, entry in enumerate(entries)
        for step in range(length)
    ]
    _write_lines(folder / "u.data", walks)
    return cycle


def _item_line(item: int, title: str) -> str:
    genres = ["0"] * 19
    return "|".join([str(item), f"{title} (1997)", "01-Jan-1997", "", "", *genres])


def _interaction_line(user: int, item: int, step: int) -> str:
    return f"{user + 1}\t{item}\t4\t{_START + _MINUTE * (user + step)}"


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii", newline="\n")
