"""Worlds of any size in which the best possible score is known.

A user walks one of two kinds of paths, a minute a step. On the *cycle* the order of the items is a
fixed random permutation: only interactions can teach it. On a *saga* the next item is the next
part by its title; held-out users walk sagas that no training user does, so only titles can tell.
All titles look alike ("Amber Harbor 7"). With probability `noise` a step shows a random item of
Zipf popularity instead, and the walk goes on as if it had not.
"""

# Axes: U users of a chunk, S steps, I items.

from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from rsllm.config.checks import Share, settings
from rsllm.config.plain import to_dict
from rsllm.errors import ConfigError
from rsllm.store.artifacts import require_writable, write_json

Longs = NDArray[np.int64]

_ADJECTIVES = """
    Amber Bitter Broken Crimson Distant Electric Final Frozen Gentle Golden Hidden Hollow Iron
    Little Lonely Lost Midnight Paper Quiet Red Secret Silent Silver Stolen Wild
"""
_NOUNS = """
    Anchor Bridge Canyon Castle Circus Dancer Desert Empire Falcon Forest Garden Harbor Island
    Lantern Letter Meadow Mirror Mountain Orchard Piano River Station Summer Train Winter
"""
_NUM_NAMES = 25 * 25
_START, _MINUTE, _RATING = 880_000_000, 60, 4
USERS_AT_ONCE = 1 << 14
NUM_CANDIDATES = 20
TRAIN_SHARE = 0.8
"""Users from here on, by first interaction, walk the later half of the sagas."""


@settings
class World:
    """The size of a world, and the way its users walk."""

    num_users: PositiveInt
    """Each starts a minute after the one before."""
    num_items: PositiveInt
    length: Annotated[int, Field(ge=2)]
    """Steps of each user, who rates all items 4."""
    seed: NonNegativeInt
    noise: Share = 0.0
    """Probability that a step shows a random item."""
    text_share: Share = 0.0
    """Share of users, evenly spread, who walk sagas; a half of the items is then on the cycle, else
    all."""


def write_world(folder: Path, **how: Any) -> Longs:
    """Write a `World`: `walks.csv`, `titles.csv`, and what is known of it in `world.json`.

    Returns:
        The cycle: item ids, each followed by the next one in a walk, the last by the first.

    Raises:
        ConfigError: a number out of its bounds, or a folder that cannot be written.
    """
    world = World(**how)
    num_items, length, text_share = world.num_items, world.length, world.text_share
    parts = 2 * length if text_share else max(1, -(-num_items // _NUM_NAMES))
    on_cycle = num_items // 2 // parts * parts if text_share else num_items
    num_sagas = (num_items - on_cycle) // parts
    words = product(("", *_NOUNS.split()), _ADJECTIVES.split(), _NOUNS.split())
    chosen = islice(words, -(-num_items // parts))
    names = [f"{one} {two} {more}".strip() for more, one, two in chosen]
    least = max(NUM_CANDIDATES + min(length - 1, 10), 3 * parts if text_share else 1)
    if num_items < least or len(names) * parts < num_items:
        raise ConfigError(f"num_items is {num_items}; choose {least} to {26 * _NUM_NAMES * parts}")
    rng = np.random.default_rng(world.seed)
    rng.shuffle(names)
    cycle: Longs = rng.permutation(on_cycle) + 1
    require_writable(folder, "world", "choose another folder")
    numbered = [f"{name} {part}" for name in names for part in range(1, parts + 1)]
    titles = enumerate(numbered[:num_items] if parts > 1 else names, start=1)
    text = "".join(f"{item},{title}\n" for item, title in [("item", "title"), *titles])
    (folder / "titles.csv").write_text(text, encoding="ascii", newline="\n")
    popularity_I = rng.permutation(1 / np.arange(1, num_items + 1)).cumsum()
    with (folder / "walks.csv").open("wb") as file:
        file.write(b"user,item,rating,time\n")
        for start in range(0, world.num_users, USERS_AT_ONCE):
            user_U = np.arange(start, min(start + USERS_AT_ONCE, world.num_users))
            entry_U1 = rng.integers(on_cycle, size=(len(user_U), 1))
            item_US = cycle[(entry_U1 + np.arange(length)) % on_cycle]
            if text_share:
                saga_US = _sagas(rng, user_U, world, num_sagas) + on_cycle + 1
                before_U = np.floor(np.append(user_U, user_U[-1] + 1) * text_share + 1e-9)
                item_US = np.where(np.diff(before_U)[:, None] > 0, saga_US, item_US)
            if world.noise:
                drawn_US = rng.random(item_US.shape) * popularity_I[-1]
                random_US = popularity_I.searchsorted(drawn_US, "right") + 1
                item_US = np.where(rng.random(item_US.shape) < world.noise, random_US, item_US)
            step_US = user_U[:, None] + np.arange(length)
            columns = {
                "user": np.repeat(user_U + 1, length),
                "item": item_US.ravel(),
                "rating": np.full(item_US.size, _RATING),
                "time": (_START + _MINUTE * step_US).ravel(),
            }
            pa_csv.write_csv(pa.table(columns), file, pa_csv.WriteOptions(include_header=False))
    known = {"num_candidates": NUM_CANDIDATES, "best_HR@1": best_scores(world)}
    write_json(folder / "world.json", to_dict(world) | known)
    return cycle


def best_scores(world: World) -> dict[str, float]:
    """Return the expected HR@1 of oracles on the last step of held-out users, by what they know.

    Each names the walk's next item if it can tell it and it is a candidate, and guesses evenly
    otherwise; none uses popularity. A walk's next item is the target with probability 1 - noise,
    and else among the uniform negatives as likely as any other item is.
    """
    history, text_share = min(world.length - 1, 10), world.text_share
    present = (NUM_CANDIDATES - 1) / (world.num_items - 1 - history)
    guess = 1 / NUM_CANDIDATES
    knows = 1 - world.noise + world.noise * (1 - present) * guess
    return {
        "titles and interactions": knows,
        "interactions": (1 - text_share) * knows + text_share * guess,
        "titles": text_share * knows + (1 - text_share) * guess,
        "chance": guess,
    }


def _sagas(rng: np.random.Generator, user_U: Longs, world: World, num_sagas: int) -> Longs:
    """Each user's parts, as items from 0, of a saga from the half for the user's time."""
    late_U = user_U >= int(TRAIN_SHARE * world.num_users + 1e-9)
    half, length = num_sagas // 2, world.length
    first_U = np.where(late_U, half, 0)
    saga_U = first_U + rng.integers(np.where(late_U, num_sagas - half, half))
    entry_U = rng.integers(length + 1, size=len(user_U))
    return (saga_U * 2 * length + entry_U)[:, None] + np.arange(length)
