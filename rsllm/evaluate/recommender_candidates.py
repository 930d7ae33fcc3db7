"""Candidate sets of the titles that a recommender ranks highest: `data.candidates = recommender`.

A re-ranker is trained and judged on what it will be given.

Axes: R rows, I items of the catalogue, T titles that may be negatives, N negatives.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from rsllm.config import Experiment
from rsllm.data import candidates, prepared
from rsllm.data.candidates import CELLS_AT_ONCE
from rsllm.data.sequences import NO_ITEM, SPLITS, Ints, Rows, Split
from rsllm.evaluate.metrics import Floats
from rsllm.evaluate.rank import eligible
from rsllm.evaluate.run import Method
from rsllm.evaluate.scorers import catalogue_scorer
from rsllm.store.artifacts import MANIFEST

POOL = 4
"""Titles that a training row's negatives are drawn from, as a multiple of `num_candidates`."""


def write_candidates(
    folder: Path, source: Path, fitted: Sequence[Path], experiment: Experiment
) -> None:
    """Copy prepared data, with a recommender's first titles in place of drawn negatives.

    Args:
        folder: takes the copy.
        source: the data that the recommenders were fitted on.
        fitted: the whole recommender and, if there are folds, the one of each, which ranks the
            training rows of the users that it has not seen.
        experiment: whose recommender it is.
    """
    left_out = shutil.ignore_patterns(MANIFEST, "candidates")
    shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)
    data, name = prepared.PreparedData.open(source), "recommender"
    size, seed = data.config["num_candidates"], data.config["seed"]
    known, method = catalogue_scorer(name), Method(name=name, scorer=name, experiment=experiment)
    scorers = [known.make(replace(method, artifact=str(path)), data) for path in fitted]
    if not scorers[1:]:
        why = "training rows get candidates from the recommender that has trained on them"
        print(f"rsllm: {why}; recommender.folds=2 asks one that has not seen the user", flush=True)

    def pools(rows: Rows) -> Ints:
        number_R = rows.user_R % (len(scorers) - 1) + 1 if scorers[1:] else 0 * rows.user_R
        scores_RI = np.empty((len(rows), len(data.titles)))
        for number in np.unique(number_R):
            scores_RI[number_R == number] = scorers[number](rows.take(number_R == number))
        return highest(scores_RI, rows, data, POOL * size)

    def sets(rows: Rows, split: Split) -> Ints:
        first_RN = highest(scorers[0](rows), rows, data, size - 1)
        keys_R = candidates.row_keys(seed, split, rows.user_R, rows.position_R, 0)
        return candidates.draw_from_pools(keys_R, first_RN, rows.target_R, size)

    def write(out: Path, path: Path, make: Callable[[Rows], Ints]) -> None:
        rows = prepared.to_rows(prepared.read_table(path, "rows"), data.config["window"])
        prepared.write_sets(out, rows, make, max(1, CELLS_AT_ONCE // len(data.titles)))

    for part in source.glob("train/part-*"):
        write(folder / "pools" / part.name, part, pools)
    for split in SPLITS[1:]:
        out = prepared.candidates_file(folder, split, 0)
        write(out, source / f"{split}.parquet", partial(sets, split=split))


def highest(scores_RI: Floats, rows: Rows, data: prepared.PreparedData, size: int) -> Ints:
    """The negatives that score highest, as many as there are, by number, padded with -1. [R, N]"""
    items_T = data.catalogue.representatives
    eligible_RT = eligible(rows.target_R, rows.history_RH, data.catalogue)
    cost_RT = np.where(eligible_RT, -scores_RI[:, items_T], np.inf)
    first_RN = np.argpartition(cost_RT, min(size, len(items_T)) - 1, axis=1)[:, :size]
    first_RN.sort(axis=1)  # a partition's order is the processor's
    found_RN = np.take_along_axis(eligible_RT, first_RN, axis=1)
    return np.where(found_RN, items_T[first_RN], np.int32(NO_ITEM))
