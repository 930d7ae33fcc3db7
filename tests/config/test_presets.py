"""Tuned settings: each is a whole experiment, and where there are none MovieLens' stand in."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from rsllm.config import Experiment
from rsllm.config.models import RECOMMENDERS
from rsllm.config.plain import replace_in, to_dict
from rsllm.config.presets import PRESETS, USUAL, preset
from rsllm.errors import ConfigError

ROOT = Path(__file__).parents[2]
TUNED = tomllib.loads(PRESETS.read_text())
ALL = [(source, model) for source, models in TUNED.items() for model in models]


@pytest.mark.parametrize(("source", "model"), ALL)
def test_a_preset_sets_what_the_file_says(source: str, model: str) -> None:
    chosen = to_dict(replace_in(Experiment(), preset(model, source)).recommender)
    expected = {name: value for name, value in TUNED[source][model].items() if name != "result"}
    assert chosen == to_dict(Experiment().recommender) | expected | {"model": model}


@pytest.mark.parametrize("model", sorted(RECOMMENDERS))
def test_other_data_take_the_usual_preset(model: str) -> None:
    assert preset(model, "some/folder") == preset(model, USUAL)


def test_an_unknown_recommender_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model is 'bert4rec'; choose one of gru4rec"):
        replace_in(Experiment(), preset("bert4rec", USUAL))


def test_the_defaults_are_the_usual_preset() -> None:
    assert replace_in(Experiment(), preset("sasrec", USUAL)) == Experiment()


@pytest.mark.parametrize(("source", "model"), ALL)
def test_a_preset_is_the_best_trial_of_its_result(source: str, model: str) -> None:
    result = json.loads((ROOT / TUNED[source][model]["result"]).read_text())
    assert (result["data"], result["model"]) == (source, model)
    scores = {t["number"]: t["curve"][-1]["score"] for t in result["trials"] if t["curve"]}
    (best,) = (t for t in result["trials"] if t["number"] == max(scores, key=scores.__getitem__))
    settings = preset(model, source)
    kept = {path: value for path, value in best["overrides"].items() if path in settings}
    assert {"recommender.width", "recommender.learning_rate"} <= kept.keys()
    assert {path: settings[path] for path in kept} == pytest.approx(kept, rel=5e-3)
