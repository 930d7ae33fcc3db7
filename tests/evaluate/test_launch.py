"""What ranks the catalogue as a method: every rule, and fitted recommenders."""

# Axes: R rows, I items.
from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_data import NUM_CANDIDATES, TITLES, WINDOW, small_data

from rsllm.config import Experiment
from rsllm.config.plain import content_hash, replace_in
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.evaluate.rank import (
    candidate_scores,
    candidate_sets,
    catalogue_scores,
    held_out,
    presented_places,
)
from rsllm.evaluate.run import (
    SHUFFLE_SEED,
    Method,
    _evaluate,
    _inputs,
    _language_scores,
    read_scores,
)
from rsllm.evaluate.scorers import catalogue_scorer
from rsllm.prompts.templates import TEXTS
from rsllm.recommenders import build, save
from rsllm.recommenders.embeddings import ItemEmbeddings, other_items
from rsllm.recommenders.rules import RULES
from rsllm.store.artifacts import Store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small")


def method(scorer: Any, artifact: Path, **settings: Any) -> Method:
    recommender = {f"recommender.{name}": value for name, value in settings.items()}
    experiment = replace_in(Experiment(), {"data.window": WINDOW, **recommender})
    return Method(name="m", scorer=scorer, experiment=experiment, artifact=str(artifact))


@pytest.mark.parametrize("rule", [*RULES, "title-similarity", "slot-rule"])
def test_every_rule_scores_the_catalogue(data: PreparedData, rule: Any, tmp_path: Path) -> None:
    vectors_ID = torch.randn(len(TITLES), 6, generator=torch.Generator().manual_seed(0))
    ItemEmbeddings(vectors_ID, source="titles").save(tmp_path)
    chosen, rows = method(rule, tmp_path), data.rows("test")
    scores_RI = catalogue_scorer(chosen.scorer).make(chosen, data)(rows)
    assert not chosen.is_language_model
    assert scores_RI.shape == (len(rows), len(TITLES))
    assert np.isfinite(scores_RI).all()
    assert np.ptp(scores_RI, axis=1).min() > 0


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_recommender_sees_the_histories_that_it_was_trained_on(
    data: PreparedData, shuffle: bool, tmp_path: Path
) -> None:
    chosen = method("recommender", tmp_path, width=8, shuffle_history=shuffle, seed=5)
    torch.manual_seed(0)
    model = build(chosen.experiment.recommender, len(TITLES), WINDOW)
    save(model, tmp_path)
    rows = data.rows("test")
    plain_RI, shuffled_RI = (catalogue_scores(model, r) for r in (rows, rows.shuffled(5)))
    assert np.abs(plain_RI - shuffled_RI).max() > 1e-3
    expected_RI = shuffled_RI if shuffle else plain_RI
    np.testing.assert_allclose(
        catalogue_scorer(chosen.scorer).make(chosen, data)(rows), expected_RI, atol=1e-6
    )


DIFFERENT: list[dict[str, Any]] = [
    {"prompt.candidate_slots": False},
    {"projector.shuffle_items": True},
    {"evaluation.decoding": ["free", "constrained"]},
    {"evaluation.candidate_orders": 2},
    {"backbone.tuning": "full"},
    {"backbone.layers": 1},
]


def test_what_changes_the_scores_has_a_key_of_its_own(tmp_path: Path) -> None:
    layout: Any = SimpleNamespace(precision="fp32")

    def key(changes: dict[str, Any], **settings: Any) -> str:
        experiment = replace_in(Experiment(), changes)
        asked = Method(name="m", scorer="likelihood", experiment=experiment, **settings)
        return content_hash(_inputs(asked, "test", tmp_path, "backbone", layout))

    keys = {key(changes) for changes in [{}, *DIFFERENT]}
    keys |= {key({}, representation="unified"), key({}, representation="llara")}
    keys |= {key({}, shuffle_titles=True), key({}, mean_of_orders=2), key({}, mean_of_orders=3)}
    assert len(keys) == len(DIFFERENT) + 6
    assert key({"stage1.samples": 7}) == key({}), "the artifact has its own"


def test_the_wording_of_prompts_has_a_key_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout: Any = SimpleNamespace(precision="fp32")

    def keys() -> list[str]:
        asked = [
            Method(name="m", scorer=scorer, experiment=Experiment())
            for scorer in ("likelihood", "recommender")
        ]
        return [content_hash(_inputs(m, "test", tmp_path, "backbone", layout)) for m in asked]

    spoken, fitted = keys()
    monkeypatch.setitem(TEXTS["words"]["game"], "noun", "video game")
    assert keys() == [keys()[0], fitted]
    assert keys()[0] != spoken


@pytest.mark.parametrize("scorer", ["likelihood", "pointer"])
def test_a_language_model_ranks_reorders_and_answers(
    data: PreparedData, random_llm: Path, scorer: Any
) -> None:
    changes = {
        "evaluation.candidate_orders": 2,
        "evaluation.decoding": ["free", "constrained"],
        "evaluation.generation_rows": 3,
        "evaluation.max_new_tokens": 4,
    }
    chosen = Method(name="m", scorer=scorer, experiment=replace_in(Experiment(), changes))
    layout: Any = SimpleNamespace(precision="fp32", use_gpu=False)
    rows = data.rows("test")
    scores, answers = _language_scores(chosen, data, [rows], str(random_llm), layout)
    shape = (len(rows), NUM_CANDIDATES)
    assert (scores["scores"].shape, scores["orders"].shape) == ((1, *shape), (2, *shape))
    assert ("likelihood" in scores) == (scorer == "pointer")
    assert answers is not None
    assert {decoding: len(found) for decoding, found in answers.items()} == {
        "free": 3,
        "constrained": 3,
    }
    assert set(answers["constrained"]) <= set(TITLES)


@pytest.mark.parametrize("shuffle", [False, True])
def test_histories_may_be_shuffled_in_evaluation_alone(
    data: PreparedData, shuffle: bool, tmp_path: Path
) -> None:
    settings = {"data.window": WINDOW, "evaluation.shuffle_history": shuffle}
    chosen = Method(name="m", scorer="markov", experiment=replace_in(Experiment(), settings))
    store, layout = Store.open(tmp_path / "store"), SimpleNamespace(threads=0)
    here = tmp_path / "store" / "data" / "small"
    shutil.copytree(data.path, here)
    made: Any = (chosen, "test", here, "", layout, store, {"of": shuffle})
    _evaluate(*made)
    found = read_scores(store.path("evaluation", {"of": shuffle}))["scores"]
    (rows,) = held_out(data, "test")
    seen = rows.shuffled(SHUFFLE_SEED) if shuffle else rows
    expected_RI = RULES["markov"](data)(seen)
    np.testing.assert_array_equal(found[0], candidate_scores(expected_RI, rows))
    assert (RULES["markov"](data)(rows.shuffled(SHUFFLE_SEED)) != RULES["markov"](data)(rows)).any()


def test_shuffled_titles_are_read_in_place_of_an_items_own(
    data: PreparedData, random_llm: Path
) -> None:
    experiment = replace_in(Experiment(), {"evaluation.generation_rows": -1})
    plain = Method(name="m", scorer="likelihood", experiment=experiment)
    answering = replace_in(experiment, {"evaluation.generation_rows": 3})
    shuffled = replace(plain, experiment=answering, shuffle_titles=True)
    others = other_items(len(TITLES)).tolist()
    renamed = replace(data, titles=[TITLES[item] for item in others])
    layout: Any = SimpleNamespace(precision="fp32", use_gpu=False)
    rows = [data.rows("test")]

    def scored(method: Method, of: PreparedData) -> Any:
        return _language_scores(method, of, rows, str(random_llm), layout)

    (found, answers), (expected, _), (own, _) = (
        scored(shuffled, data),
        scored(plain, renamed),
        scored(plain, data),
    )
    assert answers is None
    np.testing.assert_array_equal(found["scores"], expected["scores"])
    np.testing.assert_array_equal(found["per_token"], expected["per_token"])
    assert np.abs(found["scores"] - own["scores"]).max() > 1e-3


@pytest.mark.parametrize("scorer", ["likelihood", "pointer"])
def test_scores_may_be_means_over_orders_of_the_candidates(
    data: PreparedData, random_llm: Path, scorer: Any
) -> None:
    experiment = replace_in(Experiment(), {"evaluation.generation_rows": -1})
    plain = Method(name="m", scorer=scorer, experiment=experiment)
    layout: Any = SimpleNamespace(precision="fp32", use_gpu=False)
    rows = data.rows("test")

    def scored(method: Method, of: Rows) -> np.ndarray:
        found, _ = _language_scores(method, data, [of], str(random_llm), layout)
        return found["scores"][0]

    given = candidate_sets(rows)
    summed = np.zeros(given.shape)
    for place_RC in presented_places(rows, 3):
        shown = np.zeros_like(given)
        for row, places in enumerate(place_RC):
            shown[row, places] = given[row]
        scores = scored(plain, replace(rows, candidates_RC=shown))
        for row, places in enumerate(place_RC):
            summed[row] += scores[row, places]
    means = scored(replace(plain, mean_of_orders=3), rows)
    np.testing.assert_allclose(means, summed / 3, atol=1e-9)
    assert np.abs(means - scored(plain, rows)).max() > 1e-3
