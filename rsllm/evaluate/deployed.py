"""The task as deployed: the whole catalogue, without what the user has seen, in lists of ten.

Beside the candidate protocol, in which the next item stands among a few others, this is what a user
would meet: who is not in the list is missed.

Axes: R rows (users), K places of a list, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, Bools, Catalogue, Ints, Rows
from rsllm.evaluate.metrics import METRICS, Floats

SIZE = 10
"""Items of a list."""
PER_USER = (f"HR@{SIZE}", f"NDCG@{SIZE}")
"""Metrics of a list that have a value for every user."""
NOWHERE = 1 << 30
"""The rank of a target that is not in its list."""


def pasts_of(rows: Rows, data: PreparedData) -> list[Ints]:
    """All that each row's user had done before the target, oldest first."""
    events = data.events()
    start_R = np.searchsorted(events.user_E, rows.user_R)
    spans = zip(start_R, rows.position_R, strict=True)
    return [events.item_E[start : start + position] for start, position in spans]


def top(scores_N: Floats, k: int) -> Ints:
    """Where the k highest scores stand, the highest first; of equal ones the first comes first."""
    if k < len(scores_N):
        least = np.partition(scores_N, -k)[-k]
        places = np.flatnonzero(scores_N >= least)
    else:
        places = np.arange(len(scores_N))
    return places[np.argsort(-scores_N[places], kind="stable")][:k].astype(np.int32)


def unseen(past: Ints, catalogue: Catalogue) -> Ints:
    """An item of each title that may be recommended and that the past does not have. [N]."""
    items_T = catalogue.representatives
    return items_T[~np.isin(catalogue.keys(items_T), catalogue.keys(past))]


def lists_of(scores_RI: Floats, pasts: Sequence[Ints], catalogue: Catalogue) -> Ints:
    """The `SIZE` best unseen items of each row, padded where there are fewer. [R, K]."""
    lists_RK = np.full((len(pasts), SIZE), NO_ITEM, np.int32)
    for row, past in enumerate(pasts):
        open_N = unseen(past, catalogue)
        best = open_N[top(scores_RI[row, open_N], SIZE)]
        lists_RK[row, : len(best)] = best
    return lists_RK


def list_metrics(lists: Sequence[Ints], target_R: Ints, catalogue: Catalogue) -> dict[str, Floats]:
    """`PER_USER` of each row's list, whose items stand best first. [R] each.

    An item with the target's title counts as the target, and what pads a list as nothing.
    """
    title_R = catalogue.keys(target_R)
    ranks_R = np.full(len(lists), NOWHERE, np.int64)
    for row, items_K in enumerate(lists):
        places = np.flatnonzero(catalogue.keys(items_K) == title_R[row])
        ranks_R[row] = 1 + places[0] if len(places) else NOWHERE
    return {name: METRICS[name].of_ranks(ranks_R) for name in PER_USER}


def reach(lists: Sequence[Ints], catalogue: Catalogue) -> Mapping[str, float]:
    """What all lists together recommend.

    Returns:
        "coverage": the share of the catalogue's titles that is recommended to anybody. "novelty":
        the mean of -log2(share of training interactions) of what is recommended, in bits (Zhou et
        al. 2010, PNAS 107). "popular": the share of recommendations that are of `popular_items`.
    """
    items_N = np.concatenate([*lists, np.empty(0, np.int32)]).astype(np.int32)
    items_N = items_N[items_N != NO_ITEM]
    share_I = (catalogue.counts_I + 1.0) / (catalogue.counts_I + 1.0).sum()
    return {
        "coverage": len(np.unique(catalogue.keys(items_N))) / len(catalogue.representatives),
        "novelty": float(-np.log2(share_I[items_N]).mean()),
        "popular": float(popular_items(catalogue.counts_I)[items_N].mean()),
    }


def popular_items(counts_I: np.ndarray) -> Bools:
    """Whether the items above each in popularity make up less than a third of all interactions."""
    ordered_I = np.sort(counts_I)
    up_to_I = ordered_I.cumsum()[np.searchsorted(ordered_I, counts_I, side="right") - 1]
    return np.asarray(3 * (counts_I.sum() - up_to_I) < counts_I.sum())
