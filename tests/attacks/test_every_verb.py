"""Every verb on a stranger's folder, before a user who says yes: no code runs, none is offered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from payloads import code_for, edit_json, torch_pickled
from test_hostile_backbones import (
    CODE,
    TOKENIZER_CODE,
    bin_beside_others,
    bin_in_the_index,
    only_bin,
    pickled_adapter,
)

from rsllm import doctor, pipeline
from rsllm.cli import build_parser, main
from rsllm.errors import DataError

SMALL = ["--data", "synthetic", "--storage", "STORE"]
BACKBONE = ["--backbone", "FOLDER", *SMALL]
TITLES = ["--set", "recommender.items=title"]
READ_AS_BACKBONE: dict[str, list[str]] = {
    "train": ["train", *BACKBONE],
    "plan": ["plan", *BACKBONE],
    "fit": ["fit", *BACKBONE, *TITLES],
    "doctor": ["doctor", "--backbone", "FOLDER", "--storage", "STORE"],
}
READ_AS_ANYTHING: dict[str, list[str]] = {
    "fetch": ["fetch", "FOLDER"],
    "fetch from": ["fetch", "llara-lastfm", "--from", "FOLDER"],
    "synthesize": ["synthesize", "FOLDER/config.json"],
    "start": ["start", "FOLDER", "--yes", "--storage", "STORE"],
    "config": ["prepare", "--config", "FOLDER/config.json", "--storage", "STORE"],
    "like": ["prepare", "--like", "FOLDER", "--storage", "STORE"],
    "prepare": ["prepare", "--data", "FOLDER", "--backbone", "FOLDER", "--storage", "STORE"],
    "fit data": ["fit", "--data", "FOLDER", "--backbone", "FOLDER", "--storage", "STORE"],
    "train data": ["train", "--data", "FOLDER", "--backbone", "FOLDER", "--storage", "STORE"],
    "plan cluster": ["plan", "--cluster", "FOLDER/config.json", *BACKBONE],
    "plan lists": ["plan", "--recommend", "FOLDER", "--storage", "STORE"],
    "audit": ["audit", "FOLDER"],
    "evaluate": ["evaluate", "--predictions", "FOLDER/x", "--data", "FOLDER", "--storage", "STORE"],
    "recommend": ["recommend", "FOLDER", "--storage", "FOLDER"],
    "export": ["export", "FOLDER", "--to", "FOLDER/new", "--as", "peft", "--storage", "FOLDER"],
    "serve": ["serve", "FOLDER", "--storage", "FOLDER"],
    "settings": ["settings", "FOLDER"],
    "docs": ["docs", "--out", "FOLDER"],
    "runs show": ["runs", "show", "FOLDER", "--storage", "FOLDER"],
    "runs diff": ["runs", "diff", "FOLDER", "FOLDER", "--storage", "FOLDER"],
}

VERBS = READ_AS_BACKBONE | READ_AS_ANYTHING


def stranger(folder: Path, payload: bytes) -> None:
    """Nothing but a config of a kind of its own."""
    for path in folder.glob("[!e]*"):
        path.unlink()
    stated = {"model_type": "stranger", "auto_map": CODE, "architectures": ["Evil"]}
    (folder / "config.json").write_text(json.dumps(stated))


def own_kind(folder: Path, payload: bytes) -> None:
    edit_json(folder / "config.json", model_type="stranger", auto_map=CODE)


def own_tokenizer(folder: Path, payload: bytes) -> None:
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=TOKENIZER_CODE)


PLACES = [stranger, own_kind, own_tokenizer, only_bin, bin_beside_others, bin_in_the_index]
PLACES += [pickled_adapter]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Questions, all of which are answered with yes."""
    questions: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *question: questions.append(question) or "y")
    return questions


def no_ray() -> None:
    raise DataError("everything was read and found well")


@pytest.mark.parametrize("place", PLACES)
def test_no_verb_runs_a_strangers_code(
    place: Callable[[Path, bytes], None],
    random_llm: Path,
    tmp_path: Path,
    canary: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "_look_at_ray", lambda *_: [])  # neither takes a backbone
    monkeypatch.setattr(pipeline, "start_ray", no_ray)
    for name, words in VERBS.items():
        folder, store = (tmp_path / name.replace(" ", "-") / part for part in ("llm", "store"))
        shutil.copytree(random_llm, folder)
        (folder / "evil.py").write_text(code_for(canary))
        place(folder, torch_pickled(canary))
        given = [w.replace("FOLDER", str(folder)).replace("STORE", str(store)) for w in words]
        code, shown = main(given), capsys.readouterr()
        assert code in (1, 2), name
        assert shown.err.count("rsllm: error: ") == 1, name
        assert "Traceback" not in shown.out + shown.err, name
        assert not asked, name
        assert not canary.exists(), name
        if name in READ_AS_BACKBONE:
            refusal = shown.out if name == "doctor" else shown.err.splitlines()[-1]
            assert "cannot load backbone" in refusal, name
            assert code == (1 if name == "doctor" else 2)
        shutil.rmtree(folder.parent)


def test_no_verb_is_left_out() -> None:
    (verbs,) = filter(None, (action.choices for action in build_parser()._actions))
    reads_nothing = {"completion"}
    assert {words[0] for words in VERBS.values()} == set(verbs) - reads_nothing
