"""Loading and adapting a backbone: what trains, and which mistakes are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rsllm.config import BackboneConfig
from rsllm.errors import ConfigError
from rsllm.model.backbone import (
    attach_lora,
    context_length,
    linear_layers,
    load_backbone,
    load_tokenizer,
)


@pytest.fixture
def copy(random_llm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_llm, tmp_path / "llm"))


def test_only_lora_trains_and_on_every_block(backbone_folder: Path) -> None:
    llm = load_backbone(backbone_folder, torch.float32)
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    weights = (
        sum(type(module).__name__ in ("Linear", "Conv1D") for module in llm.modules()) - 1
    )  # the head
    adapted = attach_lora(llm, BackboneConfig(lora_rank=2))
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * weights
    assert all("lora_" in name and "head" not in name for name in trainable)


def test_named_targets_are_the_only_ones(random_llm: Path) -> None:
    config = BackboneConfig(lora_rank=2, lora_targets=("q_proj", "v_proj"))
    adapted = attach_lora(load_backbone(random_llm, torch.float32), config)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in trainable)


def test_unmatched_lora_target_is_refused(random_llm: Path) -> None:
    llm = load_backbone(random_llm, torch.float32)
    config = BackboneConfig(lora_targets=("q_proj", "c_attn"))
    with pytest.raises(ConfigError, match=r"\['c_attn'\] match no layer of .*'q_proj'"):
        attach_lora(llm, config)


def test_architecture_is_read_off_the_model(random_llm: Path) -> None:
    llm = load_backbone(random_llm, torch.float32)
    assert context_length(llm.config) == 1024
    projections = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert linear_layers(llm) == projections


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load backbone"):
        load_backbone(copy, torch.float32)


def test_weights_in_another_format_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load backbone"):
        load_backbone(copy, torch.float32)


def test_truncated_weights_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="cannot load backbone"):
        load_backbone(copy, torch.float32)


def test_missing_weights_are_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="up_proj"):
        load_backbone(copy, torch.float32)


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, name: str) -> None:
    if name:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="cannot load backbone"):
        load_backbone(tmp_path, torch.float32)
    with pytest.raises(ConfigError, match="it has no tokenizer; fetch it again"):
        load_tokenizer(tmp_path)
