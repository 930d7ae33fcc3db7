"""The task as deployed, and the choice of what ranks."""

# Axes: R rows, K places of a list.
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from small_data import TITLES

from rsllm.data.sequences import Rows
from rsllm.errors import ConfigError
from rsllm.evaluate.deployed import list_metrics, lists_of, pasts_of, popular_items, reach
from rsllm.evaluate.rank import rank_catalogue
from rsllm.recommend.choose import Remembering, chosen, deployed
from rsllm.recommend.ranker import Ranker
from rsllm.report.page import NOTES
from rsllm.report.tables import deployed as deployed_table
from rsllm.store.artifacts import Store


@dataclass
class Knows:
    """A language model that ranks the items which the validation rows ask for first, or last."""

    targets: dict[tuple[int, ...], int]
    good: bool
    scorer: str = "catalogue"
    num_candidates: int = 0

    def __call__(self, rows: Rows) -> np.ndarray:
        scores_RI = np.zeros((len(rows), len(TITLES)))
        for row in range(len(rows)):
            target = self.targets[tuple(rows.histories(row).tolist())]
            scores_RI[row, target] = 9.0 if self.good else -9.0
        return scores_RI


def knowing(ranker: Ranker, *, good: bool) -> Ranker:
    rows = ranker.data.rows("validation")
    pairs = zip(range(len(rows)), rows.target_R.tolist(), strict=True)
    targets = {tuple(rows.histories(row).tolist()): target for row, target in pairs}
    return replace(ranker, language=Knows(targets, good))


def test_pasts_are_all_that_came_before(history_model: Ranker) -> None:
    data = history_model.data
    events, rows = data.events(), data.rows("test")
    for row, past in enumerate(pasts_of(rows, data)):
        own = events.item_E[events.user_E == rows.user_R[row]].tolist()
        assert past.tolist() == own[: own.index(rows.target_R[row])]


def test_metrics_of_lists(history_model: Ranker) -> None:
    catalogue = history_model.data.catalogue
    lists = [np.array([5, 3, 1], np.int32), np.array([2, 9], np.int32), np.array([0], np.int32)]
    target_R = np.array([1, 4, 0], np.int32)
    found = list_metrics(lists, target_R, catalogue)
    assert found["HR@10"].tolist() == [1, 0, 1]
    np.testing.assert_allclose(found["NDCG@10"], [1 / math.log2(4), 0, 1])
    assert TITLES[7] == TITLES[3]
    twin = list_metrics([lists[0]], np.array([7], np.int32), catalogue)
    np.testing.assert_allclose(twin["NDCG@10"], [1 / math.log2(3)])


@pytest.mark.parametrize(
    "counts",
    [[5, 4, 3, 2, 2, 1, 0], [1, 1, 1, 1], [9, 0, 0], [2, 0, 7, 7, 7, 2, 2, 1], [10, 1, 1]],
)
def test_popular_items_have_a_third_of_the_interactions(counts: list[int]) -> None:
    above = [sum(other for other in counts if other > count) for count in counts]
    expected = [each < sum(counts) / 3 for each in above]
    assert popular_items(np.array(counts)).tolist() == expected


def test_what_all_lists_reach(history_model: Ranker) -> None:
    catalogue = history_model.data.catalogue
    lists = [np.array([5, 3], np.int32), np.array([5, 9], np.int32)]
    counts = [catalogue.counts_I[item] + 1 for item in (5, 3, 5, 9)]
    total = sum(catalogue.counts_I.tolist()) + len(TITLES)
    found = reach(lists, catalogue)
    assert found["coverage"] == 3 / len(set(TITLES))
    assert found["novelty"] == pytest.approx(np.mean([-math.log2(c / total) for c in counts]))
    assert 0 <= found["popular"] <= 1


def test_deployed_lists_hold_nothing_of_the_past(history_model: Ranker) -> None:
    found = deployed(history_model, "validation")
    rows = history_model.data.rows("validation")
    pasts = pasts_of(rows, history_model.data)
    for by in ("recommender", "catalogue"):
        lists = [replace(history_model, by=by).lists([past], 10)[0].items for past in pasts]
        expected = list_metrics(lists, rows.target_R, history_model.data.catalogue)
        assert found["users"][by]["NDCG@10"] == expected["NDCG@10"].tolist()
        assert found["estimates"][by]["HR@10"]["value"] == expected["HR@10"].mean()


def test_lists_of_an_evaluation_are_those_of_a_ranker(history_model: Ranker) -> None:
    data = history_model.data
    rows = data.rows("validation")
    pasts = pasts_of(rows, data)
    assert history_model.recommender is not None
    found = rank_catalogue(history_model.recommender, [rows], data, pasts)
    ranked = replace(history_model, by="recommender").lists(pasts, 10)
    assert found["lists"].tolist() == [own.items.tolist() for own in ranked]
    scores_RI, few = history_model.recommender(rows), data.catalogue.representatives[:3]
    some = replace(data.catalogue, representatives=few)
    short_RK = lists_of(scores_RI, [np.append(past, few[0]) for past in pasts], some)
    assert (short_RK[:, 2:] == -1).all()
    assert list_metrics([*short_RK], np.full(len(rows), few[0]), some)["HR@10"].tolist() == [0] * 6
    assert reach([*short_RK], some)["coverage"] <= 2 / 3


@pytest.mark.parametrize(("good", "by"), [(True, "catalogue"), (False, "recommender")])
def test_what_is_better_beyond_chance_is_chosen(
    history_model: Ranker, tmp_path: object, good: bool, by: str
) -> None:
    ranker = knowing(history_model, good=good)
    found = chosen(ranker, Store.open(str(tmp_path)))
    assert found.by == by
    assert "as deployed on 6 validation users" in found.why
    if good:
        np.testing.assert_allclose(deployed(ranker, "validation")["users"]["catalogue"]["HR@10"], 1)


def test_half_of_the_users_never_choose_their_own_weight(history_model: Ranker) -> None:
    """With a weight that only helps the users it was found on, nothing is gained."""
    found = deployed(knowing(history_model, good=True), "validation")
    assert found["users"]["fused"]["NDCG@10"] == found["users"]["catalogue"]["NDCG@10"]
    assert found["weight"] == 0.0


def test_a_choice_is_made_once(history_model: Ranker, tmp_path: object) -> None:
    store = Store.open(str(tmp_path))
    first = chosen(knowing(history_model, good=True), store)
    again = chosen(knowing(history_model, good=False), store)  # of the same name
    assert (again.by, again.weight, again.why) == (first.by, first.weight, first.why)


def test_scores_are_computed_once() -> None:
    asked: list[int] = []

    def score(rows: Rows) -> np.ndarray:
        asked.extend(rows.user_R.tolist())
        return rows.user_R[:, None] * 10.0

    none = np.empty((3, 1), np.int32)
    numbers = np.array([4, 2, 7], np.int32)
    rows = Rows(numbers, numbers, none, numbers, numbers, numbers.astype(np.int64))
    remembering = Remembering(score)
    assert remembering(rows.take(np.array([0, 1]))).tolist() == [[40], [20]]
    assert remembering(rows).tolist() == [[40], [20], [70]]
    assert asked == [4, 2, 7]


def test_asking_for_what_there_is_not(history_model: Ranker, tmp_path: object) -> None:
    store = Store.open(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot rank by"):
        chosen(history_model, store, "pointer")
    alone = replace(history_model, language=None, by="recommender")
    assert chosen(alone, store).by == "recommender"
    with pytest.raises(ConfigError, match="nothing to fuse"):
        chosen(alone, store, "fused")


REACHED = ("coverage", "novelty", "popular")


def test_a_report_shows_lists_as_deployed() -> None:
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 8}
    facts = {
        "HR@10": estimate,
        "NDCG@10": estimate,
        "coverage": 0.3,
        "novelty": 5.0,
        "popular": 1.0,
    }
    methods = [{"name": "SASRec", "deployed": facts}, {"name": "RSLLM", "deployed": None}]
    table = deployed_table({"methods": methods})
    assert [row["method"] for row in table.rows] == ["SASRec"]
    assert table.header == ["method", *facts]
    assert table.note in NOTES
