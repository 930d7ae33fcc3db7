"""Small prepared data whose candidates are what made-up recommenders rank highest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small_data import TITLES, WINDOW

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.evaluate.rank import catalogue_scores
from rsllm.evaluate.recommender_candidates import write_candidates
from rsllm.recommenders import build, load, save
from rsllm.recommenders.base import Recommender
from rsllm.store.artifacts import commit_dir

EXPERIMENT = replace_in(Experiment(), {"data.window": WINDOW, "recommender.width": 8})


def made_up_recommender(folder: Path, seed: int, fitted_on: str) -> None:
    """Write a recommender with random weights that no two seeds share."""
    torch.manual_seed(seed)
    model = build(EXPERIMENT.recommender, len(TITLES), WINDOW)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    with commit_dir(folder, kind="recommender", inputs={"data": fitted_on}) as staging:
        save(model, staging)


def loaded(folder: Path) -> Recommender:
    return load(folder, EXPERIMENT.recommender, len(TITLES), WINDOW)


def ranked_data(
    data: PreparedData, folds: int = 0, *, name: str = "ranked", fitted_on: str = "small"
) -> PreparedData:
    """`data` again, beside it in a store, under the candidates of a recommender and its folds."""
    store = data.path.parents[1]
    fitted = [store / "recommender" / f"{name}-{number}" for number in range(1 + folds)]
    for number, folder in enumerate(fitted):
        made_up_recommender(folder, number, fitted_on)
    inputs = data.facts["inputs"] | {"config": data.config | {"candidates": "recommender"}}
    inputs |= {"data": data.path.name, "recommender": fitted[0].name}
    folder = data.path.with_name(name)
    with commit_dir(folder, kind="data", inputs=inputs) as staging:
        write_candidates(staging, data.path, fitted, EXPERIMENT)
    return PreparedData.open(folder)


def naive_best(model: Recommender, rows: Rows, row: int, data: PreparedData) -> list[int]:
    """The eligible negatives of a row, the best first, by a loop over the catalogue."""
    (scores,) = catalogue_scores(model, rows.take(np.array([row])))
    titles = [title.casefold() for title in data.titles]
    barred = {titles[item] for item in (*rows.histories(row), rows.target_R[row])}
    allowed, met = [], set[str]()
    for item, title in enumerate(titles):
        if title not in barred and title not in met:
            allowed.append(item)
        met.add(title)
    return sorted(allowed, key=lambda item: -scores[item])
