"""Oracles on generated worlds score what `world.json` says, through the real preparation."""

from __future__ import annotations

import csv
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rsllm.config import DataConfig
from rsllm.data.prepare import prepare
from rsllm.data.prepared import PreparedData
from rsllm.data.synthetic import write_world
from rsllm.errors import ConfigError
from rsllm.store.artifacts import Store

NUMBERED = re.compile(r"(.+) (\d+)")


def test_the_plain_world_is_one_cycle(tmp_path: Path) -> None:
    cycle = write_world(tmp_path, num_users=30, num_items=700, length=9, seed=3)
    assert sorted(cycle) == list(range(1, 701))
    following = dict(zip(cycle.tolist(), np.roll(cycle, -1).tolist(), strict=True))
    with (tmp_path / "walks.csv").open() as file:
        rows = [[int(v) for v in row] for row in list(csv.reader(file))[1:]]
    assert len(rows) == 270
    for (user, item, _, time), (other, next_item, _, later) in pairwise(rows):
        if user == other:
            assert (following[item], later - time) == (next_item, 60)
    with (tmp_path / "titles.csv").open() as file:
        titles = [row["title"] for row in csv.DictReader(file)]
    assert len(set(titles)) == 700
    best = json.loads((tmp_path / "world.json").read_text())["best_HR@1"]
    assert best["interactions"] == best["titles and interactions"] == 1
    assert best["titles"] == best["chance"] == 1 / 20


def test_worlds_depend_on_their_seed_alone(tmp_path: Path) -> None:
    size = {"num_users": 40, "num_items": 400, "length": 8, "noise": 0.3, "text_share": 0.5}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_world(tmp_path / name, **size, seed=seed)  # type: ignore[arg-type]
    walks = [(tmp_path / name / "walks.csv").read_text() for name in "abc"]
    assert walks[0] == walks[1] != walks[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": 0}, "num_users is 0; it should be greater than 0"),
        ({"num_items": -1}, "num_items is -1; it should be greater than 0"),
        ({"length": 1}, "length is 1; it should be greater than or equal to 2"),
        ({"seed": -1}, "seed is -1; it should be greater than or equal to 0"),
        ({"num_items": 11, "length": 20}, "num_items is 11; choose 30 to"),
        ({"num_items": 26}, "num_items is 26; choose 27 to"),
        ({"text_share": 0.5, "num_items": 40}, "num_items is 40; choose 48 to"),
        ({"noise": 1.0}, r"noise is 1\.0; it should be less than 1"),
    ],
)
def test_impossible_worlds_are_refused(
    tmp_path: Path, changes: dict[str, float], message: str
) -> None:
    size = {"num_users": 9, "num_items": 60, "length": 8, "seed": 0} | changes
    with pytest.raises(ConfigError, match=message):
        write_world(tmp_path, **size)  # type: ignore[arg-type]


def test_a_world_needs_a_folder_and_room_for_candidates(tmp_path: Path) -> None:
    write_world(tmp_path, num_users=9, num_items=27, length=8, seed=0)
    best = json.loads((tmp_path / "world.json").read_text())["best_HR@1"]
    assert best["interactions"] == 1, "19 of the 19 others are candidates"
    with pytest.raises(ConfigError, match=r"titles\.csv cannot be written .*choose another folder"):
        write_world(tmp_path / "titles.csv", num_users=9, num_items=60, length=8, seed=0)


@pytest.mark.ray
def test_oracles_score_what_is_known(tmp_path: Path, ray_cluster: str) -> None:
    """About 4,000 held-out rows; each oracle within three standard errors."""
    world = tmp_path / "world"
    settings = {"noise": 0.2, "text_share": 0.4}
    cycle = write_world(world, num_users=10_000, num_items=2000, length=12, seed=0, **settings)
    best = json.loads((world / "world.json").read_text())["best_HR@1"]
    store = Store.open(tmp_path / "store")
    data = PreparedData.open(prepare(DataConfig(source=str(world), num_draws=2), store, Path))
    following = dict(zip((cycle - 1).tolist(), (np.roll(cycle, -1) - 1).tolist(), strict=True))
    trained = _trained_transitions(data)
    hits: dict[str, list[bool]] = {"titles": [], "interactions": [], "titles and interactions": []}
    rng = np.random.default_rng(0)
    for split in ("validation", "test"):
        for draw in range(2):
            rows = data.rows(split, draw)  # type: ignore[arg-type]
            assert rows.candidates_RC is not None
            for i, target in enumerate(rows.target_R):
                walk = rows.histories(i).tolist()
                by_title = _path_end(walk, lambda item: _next_part(data, item))
                by_cycle = _path_end(walk, following.get)
                candidates = rows.candidates_RC[i].tolist()
                for name, said in (
                    ("titles", by_title),
                    ("interactions", by_cycle),
                    ("titles and interactions", by_title if by_title is not None else by_cycle),
                ):
                    guess = said if said in candidates else rng.choice(candidates)
                    hits[name].append(guess == target)
    for name, found in hits.items():
        error = math.sqrt(best[name] * (1 - best[name]) / (len(found) / 2))
        assert abs(np.mean(found) - best[name]) < 3 * error + 0.01, name
    late = {(a, b) for a, b in trained if _next_part(data, a) == b and trained[a, b] > 2}
    held_out = {w for i in range(len(rows)) for w in _pairs(rows.histories(i).tolist())}
    assert len(late & held_out) <= 3, "no statistic of training knows the late sagas"


def _path_end(walk: list[int], successor: object) -> int | None:
    """The item after a walk of which two items at their distance agree with a rule, else None."""
    for back in range(1, len(walk)):
        for earlier in range(back + 1, len(walk) + 1):
            item = walk[-earlier]
            for _ in range(earlier - back):
                item = successor(item) if item is not None else None  # type: ignore[operator]
            if item == walk[-back]:
                for _ in range(back):
                    item = successor(item) if item is not None else None  # type: ignore[operator]
                return item
    return None


def _next_part(data: PreparedData, item: int) -> int | None:
    found = NUMBERED.fullmatch(data.titles[item])
    assert found is not None
    wanted = f"{found[1]} {int(found[2]) + 1}"
    after = item + 1
    return after if after < len(data.titles) and data.titles[after] == wanted else None


def _pairs(items: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(items))


def _trained_transitions(data: PreparedData) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    rows = data.rows("train")
    for i, target in enumerate(rows.target_R):
        pair = (int(rows.histories(i)[-1]), int(target))
        counts[pair] = counts.get(pair, 0) + 1
    return counts
