"""Lists for histories, against loops that say what a list is."""

# Axes: R histories, I items, N candidates.
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax
from small_data import NUM_CANDIDATES, TITLES

from rsllm.data.sequences import Rows
from rsllm.errors import ConfigError
from rsllm.evaluate.deployed import pasts_of, top
from rsllm.evaluate.rank import score_candidates
from rsllm.recommend.items import UnknownItem
from rsllm.recommend.ranker import Filter, Ranker, rows_of
from rsllm.store.artifacts import Store

README = Path(__file__).parents[2] / "README.md"
PASTS = [np.array(past, np.int32) for past in ([4, 9], [3, 1, 20, 11, 8, 0], [15], [7, 2, 5])]


def naive_open(past: Sequence[int], *, never: Sequence[int] = ()) -> list[int]:
    """The first item of each title that neither the past nor `never` has."""
    closed = {TITLES[item] for item in [*past, *never]}
    return [i for i, t in enumerate(TITLES) if t not in closed and TITLES.index(t) == i]


def ordered(items: Sequence[int], scores: Sequence[float]) -> list[int]:
    return [item for _, item in sorted(zip(scores, items, strict=True), key=lambda p: -p[0])]


def scores_of(ranker: Ranker, by: str, past: np.ndarray, items: Sequence[int]) -> np.ndarray:
    """A history alone, by the parts that the ranker has."""
    rows = rows_of([past], ranker.window)
    assert ranker.recommender is not None
    assert ranker.language is not None
    alone = ranker.recommender(rows)[0, list(items)]
    if by == "recommender":
        return alone
    own = ranker.language(rows)[0, list(items)]
    if by == "catalogue":
        return own
    return np.asarray(log_softmax(own) + ranker.weight * log_softmax(alone))


@pytest.mark.parametrize("by", ["recommender", "catalogue", "fused"])
def test_lists_are_what_a_loop_finds(history_model: Ranker, by: str) -> None:
    ranker = replace(history_model, by=by, weight=0.7)
    never = np.array([6, 21], np.int32)
    found = ranker.lists(PASTS, 5, Filter(never=never))
    for past, ranked in zip(PASTS, found, strict=True):
        items = naive_open(past, never=never)
        scores = scores_of(ranker, by, past, items)
        assert ranked.items.tolist() == ordered(items, scores)[:5]
        np.testing.assert_allclose(ranked.scores, np.sort(scores)[::-1][:5], atol=1e-5)
        alone = scores_of(ranker, "recommender", past, items)
        places = [ordered(items, alone).index(item) + 1 for item in ranked.items]
        assert ranked.recommender_ranks.tolist() == places


def test_scores_equal_those_of_an_evaluation_in_any_batch(history_model: Ranker) -> None:
    rows = history_model.data.rows("validation")
    pasts = pasts_of(rows, history_model.data)
    assert history_model.language is not None
    judged_RI = history_model.language(rows)
    for order in (range(len(rows)), reversed(range(len(rows)))):
        for row in order:
            ranked = replace(history_model, by="catalogue").lists([pasts[row]], 30)[0]
            np.testing.assert_allclose(ranked.scores, judged_RI[row, ranked.items], atol=1e-5)


def test_a_choice_prompt_lists_what_the_recommender_names(choice_model: Ranker) -> None:
    assert choice_model.rankers == ["recommender", "pointer", "fused"]
    ranker = replace(choice_model, by="pointer")
    objective, encoder = ranker.language.model  # type: ignore[union-attr]
    for past, ranked in zip(PASTS, ranker.lists(PASTS, 3), strict=True):
        items = naive_open(past)
        named = ordered(items, scores_of_recommender(ranker, past, items))[:NUM_CANDIDATES]
        rows = rows_of([past], ranker.window)
        chosen_RN = np.array([named], np.int32)
        asked = replace(rows, candidates_RC=chosen_RN, target_R=chosen_RN[:, -1])
        scores_RN = score_candidates(
            objective, asked, encoder, ranker.data, "pointer", batch_size=1
        )
        assert ranked.items.tolist() == ordered(named, scores_RN[0])[:3]


def scores_of_recommender(ranker: Ranker, past: np.ndarray, items: Sequence[int]) -> np.ndarray:
    assert ranker.recommender is not None
    return ranker.recommender(rows_of([past], ranker.window))[0, list(items)]


def test_candidates_of_a_user_are_ranked(choice_model: Ranker) -> None:
    table = choice_model.rank([TITLES[4], TITLES[9]], ["i3", "i12", TITLES[0]])
    assert sorted(table["item_id"]) == ["i0", "i12", "i3"]
    assert table["rank"].tolist() == [1, 2, 3]
    assert table["score"].is_monotonic_decreasing
    with pytest.raises(ConfigError, match="twice"):
        choice_model.rank([TITLES[4]], ["i3", TITLES[3]])


def test_filters(history_model: Ranker) -> None:
    history = [TITLES[4], TITLES[9]]
    everything = history_model.recommend(history, k=100)
    assert len(everything) == len(set(TITLES)) - 2
    assert not {TITLES[4], TITLES[9]} & set(everything["title"])
    assert everything["title"].is_unique
    seen = history_model.recommend(history, k=100, include_seen=True)
    assert len(seen) == len(set(TITLES))
    only = history_model.recommend(history, only=["i1", "i2", "i4"], never=["i2"])
    assert only["item_id"].tolist() == ["i1"]


def test_an_item_that_no_row_trains_is_known_by_its_title(history_model: Ranker) -> None:
    table = history_model.recommend([TITLES[4]], k=100)
    trained = {f"i{i}" for i in np.flatnonzero(history_model.data.catalogue.counts_I)}
    assert (table["source"] == "interactions").tolist() == [i in trained for i in table["item_id"]]


def test_known_users_with_all_of_their_past(history_model: Ranker) -> None:
    events = history_model.data.events()
    table = history_model.recommend(users=["u0", "u21"], k=100)
    for user in (0, 21):
        seen = {TITLES[item] for item in events.item_E[events.user_E == user]}
        own = table[table["user_id"] == f"u{user}"]
        assert set(own["title"]) == set(TITLES) - seen
    with pytest.raises(ConfigError, match="no user is called 'u99'; the data have 22"):
        history_model.recommend(users=["u99"])


def test_many_histories_by_name(history_model: Ranker) -> None:
    asked = {"ann": ["i1", "i2"], "bob": ["i9"]}
    table = history_model.recommend(asked, k=2)
    assert table["user_id"].tolist() == ["ann", "ann", "bob", "bob"]
    alone = history_model.recommend(asked["bob"], k=2)
    assert table[table["user_id"] == "bob"]["item_id"].tolist() == alone["item_id"].tolist()


def test_what_an_item_of_the_history_adds(history_model: Ranker) -> None:
    ranker = replace(history_model, by="catalogue")
    history, target = [3, 1, 20], 14
    table = ranker.explain([f"i{i}" for i in history], "i14")
    assert ranker.language is not None

    def score(past: list[int]) -> float:
        rows = rows_of([np.array(past, np.int32)], ranker.window)
        return float(ranker.language(rows)[0, target])  # type: ignore[misc]

    without = [score(history[:at] + history[at + 1 :]) for at in range(3)]
    np.testing.assert_allclose(table["without"], without, atol=1e-5)
    np.testing.assert_allclose(table["adds"], score(history) - np.array(without), atol=1e-5)
    with pytest.raises(ConfigError, match="at least two"):
        ranker.explain(["i1"], "i2")


def test_what_is_similar(history_model: Ranker) -> None:
    vectors = history_model.vectors_IE
    table = history_model.similar(TITLES[3], k=3)

    def cosine(item: int) -> float:
        lengths = np.linalg.norm(vectors[item]) * np.linalg.norm(vectors[3])
        return float(vectors[item] @ vectors[3] / lengths)

    items = naive_open([3])
    expected = ordered(items, [cosine(item) for item in items])[:3]
    assert table["item_id"].tolist() == [f"i{item}" for item in expected]
    np.testing.assert_allclose(table["score"], [cosine(item) for item in expected])


@pytest.mark.parametrize(
    ("text", "item"),
    [("Last Matrix", 0), ("last MATRIX", 0), ("i7", 7), (TITLES[2], 2), ("Last Matrix (1999)", 0)],
)
def test_items_are_found(history_model: Ranker, text: str, item: int) -> None:
    assert TITLES[0] == "Last Matrix"
    assert history_model.items.find(text) == item


def test_a_history_may_be_a_column(history_model: Ranker) -> None:
    history = history_model.data.titles[:2]
    for column in (pd.Series(history), np.array(history)):
        pd.testing.assert_frame_equal(
            history_model.recommend(column, k=3), history_model.recommend(history, k=3)
        )


def test_items_that_are_not_there(history_model: Ranker) -> None:
    with pytest.raises(UnknownItem, match=r"'Last Matricks'; the nearest titles are 'Last Matrix'"):
        history_model.items.find("Last Matricks")
    named = replace(
        history_model.data, source_ids=["Quiet Matrix", *history_model.data.source_ids[1:]]
    )
    with pytest.raises(UnknownItem, match="is a title and also the id of 'Last Matrix'"):
        replace(history_model, data=named).items.find("Quiet Matrix")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"history": []}, "history is empty"),
        ({"history": "Quiet Matrix"}, "'Quiet Matrix' is one name; give a list"),
        ({"history": {"me": "Quiet Matrix"}}, "'Quiet Matrix' is one name; give a list"),
        ({"history": ["i1"], "never": "i12"}, "'i12' is one name; give a list"),
        ({"users": "u12"}, "'u12' is one name; give a list"),
        ({"users": 12}, "12 is one name; give a list"),
        ({"history": Path("i1")}, r"PosixPath\('i1'\) is one name; give a list"),
        ({"history": ["i1"], "only": b"i2"}, "b'i2' is one name; give a list"),
        ({"history": ["i1"], "k": 0}, "k is 0"),
        ({}, "either a history or users"),
        ({"history": ["i1"], "users": ["u1"]}, "either a history or users"),
    ],
)
def test_mistakes(history_model: Ranker, asked: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=message):
        history_model.recommend(**asked)


def test_it_ranks_by_what_it_has(history_model: Ranker) -> None:
    with pytest.raises(ConfigError, match="cannot rank by 'pointer'; choose one of recommender, c"):
        replace(history_model, by="pointer")


def test_without_a_recommender_a_choice_needs_candidates(choice_model: Ranker) -> None:
    alone = replace(choice_model, recommender=None, by="pointer")
    with pytest.raises(ConfigError, match="give candidates"):
        alone.recommend(["i1"])
    assert len(alone.rank(["i1"], ["i2", "i3"])) == 2


def test_the_snippet_of_the_readme(
    made: tuple[Store, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With titles of these data in the place of films."""
    store, names = made
    (tmp_path / "rsllm-store").symlink_to(store.root)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", README.read_text(), re.DOTALL)
    (snippet,) = (block for block in blocks if "rsllm.load" in block)
    there = {
        "stage-2/0d67": names["history"],
        "Titanic (1997)": TITLES[0],
        "City of Angels (1998)": TITLES[1],
        "Ghost (1990)": TITLES[2],
    }
    for shown, own in there.items():
        assert shown in snippet
        snippet = snippet.replace(shown, own)
    exec(snippet, {})
    said = capsys.readouterr().out
    assert "recommender_rank" in said
    assert "adds" in said


def test_top_keeps_the_order_of_equals() -> None:
    scores = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert top(scores, 4).tolist() == [1, 3, 2, 4]
    assert top(scores, 9).tolist() == [1, 3, 2, 4, 5, 0]


def test_rows_hold_the_newest_items() -> None:
    rows: Rows = rows_of([np.arange(6, dtype=np.int32), np.array([5], np.int32)], 4)
    assert rows.history_RH.tolist() == [[2, 3, 4, 5], [5, -1, -1, -1]]
    assert rows.length_R.tolist() == [4, 1]
