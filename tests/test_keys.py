"""What decides an artifact decides its key: backbones, prompts, precision and the code itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsllm.assets.catalogue import fingerprint
from rsllm.compute.layout import Layout
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.pipeline import Pipeline
from rsllm.prompts.templates import TEXTS
from rsllm.store.artifacts import Store, manifest
from rsllm.store.versions import VERSIONS
from rsllm.study.measure import CODE, Runner

DATA = "0123456789abcdef"
LAYOUT = Layout(
    workers=1, cpus_per_worker=1, use_gpu=False, threads=1, precision="fp32", concurrent_trials=1
)


@pytest.fixture
def folder(random_llm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_llm, tmp_path / "llm"))


def key(folder: Path, layout: Layout = LAYOUT) -> str:
    """Of a text-only stage 2 on prepared data."""
    changes = {"data.source": "synthetic", "backbone.source": str(folder), "stage1.samples": 0}
    experiment = replace_in(Experiment(), {**changes, "stage2.representation": "text"})
    pipeline = Pipeline(experiment, folder.parent / "store")
    known = {"_data": Path(DATA), "_mixture": [], "layout": layout}
    pipeline.__dict__.update(known)  # which would take a Ray to find out
    return pipeline._watched_path.name


def rotate(folder: Path) -> None:
    edit(folder / "config.json", rope_theta=3.0)


def lower_case(folder: Path) -> None:
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("{}")


DECIDES = [rotate, lower_case, other_weights, put("vocab.json"), put("merges.txt")]
DECIDES += [put(name) for name in ("added_tokens.json", "special_tokens_map.json", "q.tiktoken")]
DECIDES += [lambda folder: edit(folder / "tokenizer_config.json", add_bos_token=True)]
IDLE = [put("generation_config.json"), put("README.md"), put("manifest.json"), put("modeling.py")]


def test_every_file_that_decides_a_backbone_decides_its_artifacts(folder: Path) -> None:
    """Also within one process, which has hashed the files before."""
    prints = [fingerprint(folder)]
    for change in DECIDES:
        change(folder)
        prints.append(fingerprint(folder))
    assert len(set(prints)) == len(DECIDES) + 1


@pytest.mark.parametrize("change", [rotate, lower_case])
def test_backbones_of_equal_weights_have_keys_of_their_own(
    change: Callable[[Path], object], folder: Path
) -> None:
    before = key(folder)
    change(folder)
    assert key(folder) != before


def test_what_computes_nothing_decides_nothing(folder: Path) -> None:
    before = key(folder)
    moved = Path(shutil.copytree(folder, folder.parent / "elsewhere"))
    for change in IDLE:
        change(moved)
    assert key(moved) == before


def test_prompts_precision_and_code_decide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key(folder), key(folder, replace(LAYOUT, precision="bf16"))]
    with monkeypatch.context() as patch:
        patch.setitem(TEXTS["template"][1], "opening", "{Noun}s that a user {done}:")
        keys.append(key(folder))
    with monkeypatch.context() as patch:
        patch.setitem(VERSIONS, "stage-2", 0)
        keys.append(key(folder))
    assert len(set(keys)) == 4
    monkeypatch.setattr("rsllm.__version__", "9.9")
    assert key(folder) == keys[0], "a release that computes the same"


def test_an_artifact_says_which_code_made_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    path = store.get("items", {"a": 1}, lambda folder: (folder / "x").touch())
    assert manifest(path)["version"] == VERSIONS["items"]


def test_a_cell_on_file_is_one_that_would_be_measured_so_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the same data, backbone and code, and a language model's in the same precision."""
    cell: dict[str, Any] = {
        "data": {"key": DATA},
        "backbone": "b",
        "code": dict(CODE),
        "layout": {"precision": "fp32"},
    }
    dataset: Any = SimpleNamespace(cell=lambda name: cell)
    runner = Runner(dataset, "")
    pipeline = SimpleNamespace(fingerprint="b", layout=SimpleNamespace(precision="fp32"))
    data = SimpleNamespace(path=Path(DATA))
    runner.__dict__.update(pipeline=pipeline, data=data)
    assert runner.known("x") == cell
    others: list[dict[str, Any]] = [
        {"data": {"key": "another"}},
        {"backbone": "c"},
        {"code": {**CODE, "stage-2": 0}},
        {"code": {**CODE, "wording": ""}},
        {"layout": {"precision": "bf16"}},
    ]
    for other in others:
        with monkeypatch.context() as patch:
            for name, value in other.items():
                patch.setitem(cell, name, value)
            assert runner.known("x") is None, other
    del cell["code"]
    assert runner.known("x") is None, "of earlier builds"
    cell |= {"code": dict(CODE), "backbone": "", "layout": {"precision": "bf16"}}
    assert runner.known("x") == cell, "a recommender is always fitted in fp32"
