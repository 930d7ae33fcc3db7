"""Rules without gradients that rank the whole catalogue: what a recommender has to beat.

Every rule is fitted on the training rows and scores like a recommender, so it is judged on the
same rows and candidate sets. Where it has nothing to say, the more popular item comes first.
"""

# Axes: R rows, H history, I items of the catalogue, U training users, D width of vectors.

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, Rows
from rsllm.recommenders import ngrams

Floats = NDArray[np.float64]
Rule = Callable[[Rows], Floats]
"""Rows -> scores of the whole catalogue [R, I], higher is better."""

RECENCY = 0.7
"""Of titles: what an item of the history counts, as a multiple of the next one."""
NEIGHBOURS = 100
"""Similar items that item-kNN keeps for each item."""


def popularity(data: PreparedData) -> Rule:
    """Training interactions of an item; the same for everybody."""
    share_I = _share(data)
    return lambda rows: np.tile(share_I, (len(rows), 1))


def markov(data: PreparedData) -> Rule:
    """How often an item came right after the last one of the history (first-order Markov)."""
    share_I, follows_II = _share(data), _follows(data)
    return lambda rows: np.asarray(follows_II[_last(rows)].todense()) + share_I


def item_knn(data: PreparedData) -> Rule:
    """Summed cosine similarity to the items of the history (Sarwar et al., WWW 2001, 3.1.1)."""
    from sklearn.neighbors import NearestNeighbors  # slow to import

    share_I, users = _share(data), data.rows("train")
    item_RX = np.column_stack([users.history_RH, users.target_R])
    row, place = np.nonzero(item_RX != NO_ITEM)
    user, height = users.user_R[row], int(users.user_R.max()) + 1
    watched_UI = _counts(user, item_RX[row, place], height, len(data.titles))
    watched_UI.data[:] = 1.0
    nearest = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(data.titles)), metric="cosine")
    watchers_IU = watched_UI.T.tocsr()
    # Named again, since without it an item would be no neighbour of its own.
    similar_II = nearest.fit(watchers_IU).kneighbors_graph(watchers_IU, mode="distance")
    similar_II.data = 1.0 - similar_II.data
    return lambda rows: (_bags(rows, len(data.titles)) @ similar_II).toarray() + 1e-6 * share_I


def order_rule(data: PreparedData) -> Rule:
    """The nearest item after the last one, in the one order that fits the training rows best.

    It learns nothing of who watches what: where it scores well, the data stand in one global
    order of items, as LLaRA's LastFM does, and a score says nothing about sequences.
    """
    place_I, size = linear_order(_follows(data)), len(data.titles)
    return lambda rows: -((place_I - place_I[_last(rows)][:, None] - 1) % size).astype(np.float64)


def similarity(vectors_ID: Floats, recency: float = 1.0) -> Rule:
    """Summed cosine of an item's vector with the history's.

    Args:
        vectors_ID: of titles, from a frozen backbone, or of slots, from a recommender.
        recency: what an item counts, as a multiple of what the next one does.
    """
    unit_ID = vectors_ID / np.linalg.norm(vectors_ID, axis=1, keepdims=True).clip(1e-9)
    return lambda rows: np.asarray(_bags(rows, len(unit_ID), recency) @ unit_ID @ unit_ID.T)


def title_ngrams(data: PreparedData) -> Rule:
    """How alike an item's title is to those of the history, by the letters of their words."""
    ngrams_IG = ngrams.title_ngrams(data.titles)

    def score(rows: Rows) -> Floats:
        history_RG = _bags(rows, len(data.titles), RECENCY) @ ngrams_IG
        return np.asarray((history_RG @ ngrams_IG.T).todense())

    return score


def sum_with(score: Rule, other: Rule, weight: float) -> Rule:
    """Log-probabilities over the catalogue of one scorer, and another's scores by a weight."""
    return lambda rows: np.asarray(log_softmax(score(rows), axis=1) + weight * other(rows))


RULES: dict[str, Callable[[PreparedData], Rule]] = {
    "popularity": popularity,
    "markov": markov,
    "item-knn": item_knn,
    "order-rule": order_rule,
    "title-ngrams": title_ngrams,
}


def linear_order(before_II: csr_matrix) -> NDArray[np.int64]:
    """Places of all items in an order that few pairs contradict.

    Takes the item that fewest of the remaining ones stand before, again and again: a topological
    order (Kahn 1962) where the pairs contradict each other nowhere, and greedy elsewhere.

    Args:
        before_II: how often the row's item came right before the column's.
    """
    pairs = csr_matrix(before_II)
    pairs.setdiag(0)
    waiting_I = np.asarray(pairs.sum(axis=0), np.float64).ravel()
    place_I = np.full(len(waiting_I), -1)
    for place in range(len(waiting_I)):
        item = int(waiting_I.argmin())
        place_I[item], waiting_I[item] = place, np.inf
        after = slice(pairs.indptr[item], pairs.indptr[item + 1])
        waiting_I[pairs.indices[after]] -= pairs.data[after]
    return place_I


def _share(data: PreparedData) -> Floats:
    """Popularity below 1, so that added to counts it decides among equal ones only."""
    counts_I = data.catalogue.counts_I
    return np.asarray(counts_I / (counts_I.max() + 1.0))


def _last(rows: Rows) -> NDArray[np.int32]:
    return np.asarray(rows.history_RH[np.arange(len(rows)), rows.length_R - 1])


def _follows(data: PreparedData) -> csr_matrix:
    """How often the column's item came right after the row's, in training rows. [I, I]."""
    rows, size = data.rows("train"), len(data.titles)
    return _counts(_last(rows), rows.target_R, size, size)


def _counts(first: Any, second: Any, height: int, width: int) -> csr_matrix:
    """How often each pair occurs. [height, width]."""
    return csr_matrix((np.ones(len(first)), (first, second)), shape=(height, width))


def _bags(rows: Rows, size: int, recency: float = 1.0) -> csr_matrix:
    """The items of each history, an item counting `recency` times what the next one does. [R, I]"""
    row, place = np.nonzero(rows.history_RH != NO_ITEM)
    weight = recency ** (rows.length_R[row] - 1.0 - place)
    return csr_matrix((weight, (row, rows.history_RH[row, place])), shape=(len(rows), size))
