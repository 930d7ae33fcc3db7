"""What ranks the catalogue as a method: every rule, and fitted recommenders."""

# Axes: R rows, I items.
from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from small_data import TITLES, WINDOW, small_data

from rsllm.config import Experiment
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.launch import Method, Rule, _catalogue_scorer
from rsllm.evaluate.rank import catalogue_scores
from rsllm.recommenders import build, save
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.settings import replace_in


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small")


def method(scorer: Any, artifact: Path, **settings: Any) -> Method:
    recommender = {f"recommender.{name}": value for name, value in settings.items()}
    experiment = replace_in(Experiment(), {"data.window": WINDOW, **recommender})
    return Method(name="m", scorer=scorer, experiment=experiment, artifact=str(artifact))


@pytest.mark.parametrize("rule", get_args(Rule))
def test_every_rule_scores_the_catalogue(data: PreparedData, rule: Any, tmp_path: Path) -> None:
    vectors_ID = torch.randn(len(TITLES), 6, generator=torch.Generator().manual_seed(0))
    ItemEmbeddings(vectors_ID, source="titles").save(tmp_path)
    chosen, rows = method(rule, tmp_path), data.rows("test")
    scores_RI = _catalogue_scorer(chosen, data)(rows)
    assert not chosen.speaks
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
    np.testing.assert_allclose(_catalogue_scorer(chosen, data)(rows), expected_RI, atol=1e-6)
