"""The list of settings, and what is said of a name that is none."""

from __future__ import annotations

import json

import pytest

from rsllm.assets.catalogue import fetch
from rsllm.cli import main
from rsllm.config import Experiment, LossConfig
from rsllm.config.plain import flat, replace_in, to_dict
from rsllm.errors import ConfigError, did_you_mean
from rsllm.settings import all_settings, settings


def test_every_setting_is_listed_with_its_default() -> None:
    plain = dict(flat(to_dict(Experiment())))
    assert {one.path: one.default for one in all_settings()} == plain


def test_what_a_setting_may_be_and_does() -> None:
    known = {one.path: one for one in all_settings()}
    assert known["stage1.loss.user_span"].choices == "history, prompt"
    assert known["data.train_share"].choices == "number > 0 < 1"
    assert known["stage2.loss.alpha"].choices == "number >= 0"
    assert known["backbone.source"].about.startswith("An asset name (see `rsllm fetch`), a local")
    assert LossConfig().alpha == known["stage2.loss.alpha"].default


def test_the_verb_lists_by_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "stage2.loss", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    loss = [f"stage2.loss.{name}" for name in to_dict(LossConfig())]
    assert [one["path"] for one in listed] == loss
    assert "projector.bounded" in settings("bounded")
    assert main(["settings", "stage2.los.alpha"]) == 2
    assert "did you mean 'stage2.loss.alpha'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "nearest"), [("tpys", "toys"), ("movielens-100", "movielens-100k")]
)
def test_the_nearest_name_is_proposed(word: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
        fetch(word)


def test_a_wrong_path_proposes_a_right_one() -> None:
    with pytest.raises(ConfigError, match=r"'stage2\.sample'; did you mean 'stage2\.samples'"):
        replace_in(Experiment(), {"stage2.sample": 3})
    with pytest.raises(ConfigError, match=r"no setting 'xyz'; see rsllm settings"):
        replace_in(Experiment(), {"xyz": 3})
    assert did_you_mean("xyz", ["abc"]) == ""
