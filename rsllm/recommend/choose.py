"""Measures rankers by the task as deployed, and chooses one on validation users.

Axes: R rows (users), W weights, I items, N listed candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rsllm.data.sequences import Ints, Rows, Split
from rsllm.errors import require
from rsllm.evaluate.compare import estimates
from rsllm.evaluate.deployed import PER_USER, SIZE, list_metrics, pasts_of, reach
from rsllm.evaluate.fuse import WEIGHTS
from rsllm.evaluate.metrics import Floats
from rsllm.evaluate.rank import fixed_sample
from rsllm.evaluate.statistics import paired
from rsllm.recommend.ranker import Ranker
from rsllm.store.artifacts import Store, read_json, write_json
from rsllm.terminal import DELAY, Progress

DECIDES = f"NDCG@{SIZE}"
USERS = {"catalogue": 400, "pointer": 100, "likelihood": 100}
"""Validation users that decide; choice prompts cost some twenty times a history prompt."""
AT_ONCE = 32
FILE = "deployed.json"


@dataclass(eq=False)
class Remembering:
    """Scores that are computed once for each row, known by its number."""

    score: Callable[[Rows], Floats]
    scorer: str = ""
    num_candidates: int = 0
    known: dict[int, Floats] = field(default_factory=dict)

    def __call__(self, rows: Rows) -> Floats:
        new = np.flatnonzero([number not in self.known for number in rows.user_R])
        what = f"rank by {self.scorer}"
        with Progress(total=len(new), desc=what, unit=" users", delay=DELAY) as shown:
            for start in range(0, len(new), AT_ONCE):
                some = rows.take(new[start : start + AT_ONCE])
                self.known |= dict(zip(some.user_R.tolist(), self.score(some), strict=True))
                shown.update(len(some))
        return np.stack([self.known[number] for number in rows.user_R])


def chosen(ranker: Ranker, store: Store, by: str = "auto") -> Ranker:
    """The same by what is asked for, or by what did best on validation users.

    There a dearer one takes the place of a cheaper one only where the paired interval of its
    NDCG@10 lies above zero. The weight of `fused` is found on the same users.

    Raises:
        ConfigError: the model cannot rank by what is asked for.
    """
    if ranker.exported and by == "auto":
        return ranker
    if ranker.exported or by not in ("auto", "fused"):
        return replace(ranker, by=by, why="as asked")
    if ranker.language is None or len(ranker.rankers) == 1:
        require(
            by == "auto", f"{ranker.name} has one thing to rank by, and nothing to fuse it with"
        )
        return replace(ranker, why="it has nothing else to rank by")
    limit = USERS[ranker.language.scorer]

    def make(folder: Path) -> None:
        write_json(folder / FILE, deployed(ranker, "validation", limit))

    found = read_json(store.get("deployed", _inputs(ranker), make) / FILE)
    weighed = replace(ranker, weight=found["weight"])
    if by != "auto":
        return replace(weighed, by=by)
    values = {name: np.array(per_user[DECIDES]) for name, per_user in found["users"].items()}
    best, *others = ranker.rankers
    for name in others:
        if paired(values[name], values[best]).difference.low > 0:
            best = name
    means = ", ".join(f"{name} {values[name].mean():.4f}" for name in ranker.rankers)
    return replace(
        weighed,
        by=best,
        why=f"{DECIDES} as deployed on {len(values[best])} validation users is {means}; what costs"
        " more has to be better beyond chance",
    )


def validated(ranker: Ranker, store: Store) -> dict[str, Any]:
    """The estimates of every ranker that `chosen` had to compare, or {} if it never had to."""
    path = store.path("deployed", _inputs(ranker)) if ranker.language else None
    return read_json(path / FILE)["estimates"] if path and store.holds(path) else {}


def _inputs(ranker: Ranker) -> dict[str, Any]:
    assert ranker.language is not None
    facts = {"model": ranker.name, "data": ranker.data.path.name, "split": "validation"}
    return facts | {"users": USERS[ranker.language.scorer]}


def deployed(ranker: Ranker, split: Split, limit: int = 0) -> dict[str, Any]:
    """Every ranker of a model on held-out users by the task as deployed.

    For `fused` each half of the users is judged by the weight that is best for the other half.

    Args:
        ranker: the model.
        split: whose users; test users are opened by `rsllm.evaluate` alone.
        limit: at most so many users, 0 for all.

    Returns:
        By ranker: "users", the `PER_USER` metrics of each user; "estimates", their means with
        intervals; "reach", what the lists together recommend; and the "weight" that is best for
        all, 0 where nothing is fused.
    """
    rows = fixed_sample(ranker.data.rows(split), limit)
    pasts, catalogue = pasts_of(rows, ranker.data), ranker.data.catalogue
    alone, language = ranker.recommender, ranker.language
    known = replace(
        ranker,
        recommender=alone and Remembering(alone, "recommender"),
        language=language and Remembering(language, language.scorer, language.num_candidates),
    )

    open_items = [ranker.open_items(past) for past in pasts]

    def lists(by: str, weight: float = 0.0) -> list[Ints]:
        own = replace(known, by=by, weight=weight)
        return [ranked.items for ranked in own.best(pasts, open_items, SIZE)]

    found = {by: lists(by) for by in known.rankers if by != "fused"}
    users = {by: list_metrics(own, rows.target_R, catalogue) for by, own in found.items()}
    weight = 0.0
    if "fused" in known.rankers:
        tried = [lists("fused", weight) for weight in WEIGHTS]
        metrics = [list_metrics(own, rows.target_R, catalogue) for own in tried]
        value_WR = np.stack([own[DECIDES] for own in metrics])
        half_R = np.arange(len(rows)) % 2
        best_H = [int(value_WR[:, half_R != half].mean(axis=1).argmax()) for half in (0, 1)]
        best_R = np.array(best_H)[half_R]
        users["fused"] = {
            name: np.stack([own[name] for own in metrics])[best_R, np.arange(len(rows))]
            for name in PER_USER
        }
        found["fused"] = [tried[best][row] for row, best in enumerate(best_R)]
        weight = WEIGHTS[int(value_WR.mean(axis=1).argmax())]
    return {
        "users": {by: {n: v.tolist() for n, v in own.items()} for by, own in users.items()},
        "estimates": {by: estimates(own) for by, own in users.items()},
        "reach": {by: reach(own, catalogue) for by, own in found.items()},
        "weight": weight,
    }
