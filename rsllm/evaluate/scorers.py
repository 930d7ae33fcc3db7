"""What scores the whole catalogue without a language model: rules, and what was fitted.

Whoever only shows results reads the facts here, so torch is imported where something is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsllm.errors import EvaluationError

if TYPE_CHECKING:
    from rsllm.data.prepared import PreparedData
    from rsllm.data.sequences import Rows
    from rsllm.evaluate.run import Method

    ScoreAll = Callable[[Rows], np.ndarray]
    """Rows -> scores of the whole catalogue [R, I], higher is better."""

SLOT_RECENCY = 0.5
"""Of the rule on slots' vectors: what an item of the history counts, as a multiple of the next."""
WEIGHING_ROWS = 2000
"""Validation rows on which the weight of titles is chosen, no more than are ranked at a time."""
TITLE_WEIGHTS = (0.0, *np.geomspace(0.25, 64, 17).tolist())
"""What title similarity may count beside a recommender's log-probabilities."""


def _rule(method: Method, data: PreparedData) -> ScoreAll:
    from rsllm.recommenders.rules import RULES

    if method.scorer not in RULES:
        known = ", ".join([*CATALOGUE_SCORERS, *RULES])
        raise EvaluationError(f"no scorer is called {method.scorer!r}; choose one of {known}")
    return RULES[method.scorer](data)


def _similarity(method: Method, data: PreparedData, recency: float) -> ScoreAll:
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.recommenders.rules import similarity

    vectors_ID = ItemEmbeddings.load(Path(method.artifact)).standardised().double().numpy()
    return similarity(vectors_ID, recency)


def _recommender(method: Method, data: PreparedData) -> ScoreAll:
    from rsllm import recommenders
    from rsllm.evaluate.rank import catalogue_scores

    folder, config = Path(method.artifact), method.experiment.recommender
    model = recommenders.load(folder, config, len(data.titles), data.config["window"])
    if config.shuffle_history:
        return lambda rows: catalogue_scores(model, rows.shuffled(config.seed))
    return partial(catalogue_scores, model)


def _recommender_with_titles(method: Method, data: PreparedData) -> ScoreAll:
    """A recommender and how alike titles are, summed with the best weight on validation (MRR)."""
    from rsllm.evaluate.rank import CATALOGUE, EXPECTED, fixed_sample, named, rank_catalogue
    from rsllm.recommenders.rules import sum_with, title_ngrams

    alone, titles = _recommender(method, data), title_ngrams(data)
    rows = fixed_sample(data.rows("validation"), WEIGHING_ROWS)
    alone_RI, titles_RI = alone(rows), titles(rows)  # once for all weights

    def mrr(weight: float) -> float:
        joined = sum_with(lambda _: alone_RI, lambda _: titles_RI, weight)
        found = rank_catalogue(joined, [rows], data)
        per_user = named(found, EXPECTED) or named(found, CATALOGUE)
        return float(per_user["MRR"].mean())

    return sum_with(alone, titles, max(TITLE_WEIGHTS, key=mrr))


def _keys(method: Method, data: PreparedData) -> ScoreAll:
    """What the catalogue scorer's keys say before a language model reads anything."""
    from rsllm.evaluate.rank import score_keys
    from rsllm.model import tuned
    from rsllm.model.catalogue import ItemKeys
    from rsllm.recommenders.embeddings import FILE, ItemEmbeddings

    folder = Path(method.artifact)
    items = ItemEmbeddings.load(folder).standardised() if (folder / FILE).exists() else None
    titles_IF, config = tuned.title_vectors(folder), method.experiment.catalogue
    keys = ItemKeys(items, titles_IF, data.catalogue, config)
    tuned.load_keys(keys, folder)
    return lambda rows: score_keys(keys, rows)


@dataclass(frozen=True, slots=True)
class CatalogueScorer:
    """How one is made, and what it depends on."""

    make: Callable[[Method, PreparedData], ScoreAll] = _rule
    trained_by: str = ""
    """The stage that trains what it has; its seed counts. Without one no seed changes anything."""
    decided_by: tuple[str, ...] = ("data", "evaluation")
    """The sections of an experiment that decide its numbers."""


_FITTED = ("data", "recommender", "evaluation")
_OF_KEYS = ("data", "recommender", "catalogue", "prompt", "evaluation")

CATALOGUE_SCORERS = {
    "recommender": CatalogueScorer(_recommender, "recommender", _FITTED),
    "recommender + titles": CatalogueScorer(_recommender_with_titles, "recommender", _FITTED),
    "slot-rule": CatalogueScorer(
        partial(_similarity, recency=SLOT_RECENCY), "recommender", _FITTED
    ),
    "title-similarity": CatalogueScorer(partial(_similarity, recency=1.0)),
    "keys": CatalogueScorer(_keys, "keys", _OF_KEYS),
}
"""All that have an artifact; any other name is a rule of `rsllm.recommenders.rules.RULES`."""


def catalogue_scorer(name: str) -> CatalogueScorer:
    """The facts of a scorer of the catalogue by its name."""
    return CATALOGUE_SCORERS.get(name) or CatalogueScorer()
