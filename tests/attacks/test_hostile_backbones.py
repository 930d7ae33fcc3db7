"""A stranger's backbone folder: its code never runs, and only safetensors hold weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from payloads import KINDS, code_for, contents, edit_json, pickled, torch_pickled

from rsllm.assets.catalogue import resolve_backbone
from rsllm.errors import ConfigError
from rsllm.model.backbone import load_backbone, load_tokenizer

CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
TOKENIZER_CODE = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.fixture
def folder(random_llm: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole backbone with a module beside it, before a user who says yes to every question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "llm"
    shutil.copytree(random_llm, folder)
    (folder / "evil.py").write_text(code_for(canary))
    return folder


def load(folder: Path) -> None:
    found = resolve_backbone(str(folder))
    load_backbone(found, torch.float32)
    load_tokenizer(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_that_is_something_else(
    file: str, kind: str, folder: Path, canary: Path, refused: Any
) -> None:
    path = folder / file
    path.write_bytes(contents(canary, path.read_bytes())[kind])
    with refused("cannot load"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "evil", "auto_map": CODE}),
        ("config.json", {"attn_implementation": "stranger/kernel"}),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": TOKENIZER_CODE}),
    ],
)
def test_settings_that_ask_for_other_code(
    file: str, changes: dict[str, Any], folder: Path, refused: Any
) -> None:
    edit_json(folder / file, **changes)
    with refused("cannot load"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_known_model_is_passed_over(file: str, folder: Path, canary: Path) -> None:
    edit_json(folder / file, auto_map=CODE | TOKENIZER_CODE)
    load(folder)
    assert not canary.exists()


def only_bin(folder: Path, payload: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)


def bin_beside_others(folder: Path, payload: bytes) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(payload)


def only_gguf(folder: Path, payload: bytes) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def bin_in_the_index(folder: Path, payload: bytes) -> None:
    _index(folder, payload, "weights.bin")


def index_that_leaves_the_folder(folder: Path, payload: bytes) -> None:
    _index(folder, payload, "../weights.safetensors")


def _index(folder: Path, payload: bytes, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / name).write_bytes(payload)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_adapter(folder: Path, payload: bytes) -> None:
    """transformers loads an adapter that it finds beside a model."""
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    settings["base_model_name_or_path"] = str(folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(payload)


@pytest.mark.parametrize("make", [pickled, torch_pickled])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        (only_bin, "has no \\*.safetensors weights"),
        (only_gguf, "has no \\*.safetensors weights"),
        (bin_beside_others, "has no \\*.safetensors weights"),
        (bin_in_the_index, "'weights.bin', which is no \\*.safetensors in it"),
        (index_that_leaves_the_folder, "'../weights.safetensors', which is no"),
        (pickled_adapter, "it is an adapter"),
    ],
)
def test_weights_that_are_pickles(
    place: Callable[[Path, bytes], None],
    message: str,
    make: Callable[[Path], bytes],
    folder: Path,
    canary: Path,
    refused: Any,
) -> None:
    place(folder, make(canary))
    with refused(message):
        load(folder)


@pytest.mark.parametrize("name", ["../../x", "/etc", "..", "a/../../b", "org/../x"])
def test_a_backbone_is_no_path_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no local folder and no hub|has no config\.json"):
        load(Path(name))
