"""The task as deployed: the whole catalogue, without what the user has seen, in lists of ten.

Beside the candidate protocol, in which the next item stands among a few others, this is what a user
would meet: who is not in the list is missed.

Axes: R rows (users), K places of a list, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Catalogue, Ints, Rows
from rsllm.evaluate.compare import popularity_buckets
from rsllm.evaluate.metrics import BUCKETS, METRICS, Floats

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


def list_metrics(lists: Sequence[Ints], target_R: Ints, catalogue: Catalogue) -> dict[str, Floats]:
    """`PER_USER` of each row's list, whose items stand best first. [R] each.

    An item with the target's title counts as the target.
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
        al. 2010, PNAS 107). "popular": the share of recommendations that are of the items which
        make up a third of all training interactions.
    """
    items_N = np.concatenate([*lists, np.empty(0, np.int32)]).astype(np.int32)
    share_I = (catalogue.counts_I + 1.0) / (catalogue.counts_I + 1.0).sum()
    popular_I = popularity_buckets(catalogue.counts_I) == BUCKETS.index("popular")
    return {
        "coverage": len(np.unique(catalogue.keys(items_N))) / len(catalogue.representatives),
        "novelty": float(-np.log2(share_I[items_N]).mean()),
        "popular": float(popular_I[items_N].mean()),
    }
