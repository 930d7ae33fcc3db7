"""The tuned artifact: plain peft reads it, it round-trips, and what does not fit is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import DATA, ITEM_WIDTH, TITLES, save_model, stir, vocabulary_size

from rsllm.config import Experiment, Representation
from rsllm.errors import CheckpointError, ConfigError
from rsllm.model import tuned
from rsllm.model.backbone import attach_lora, load_backbone
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.settings import replace_in

SMALL = replace_in(Experiment(), {"backbone.lora_rank": 3, "projector.hidden": 16})
ITEMS = ItemEmbeddings(
    torch.randn(len(TITLES), ITEM_WIDTH, generator=torch.Generator().manual_seed(0)), "made up"
)


def build(
    folder: Path, representation: Representation = "unified", seed: int = 0, **overrides: Any
) -> tuned.LanguageModel:
    experiment = replace_in(SMALL, overrides)
    return tuned.build(
        experiment,
        representation,
        folder,
        DATA,
        ITEMS if representation == "unified" else None,
        dtype=torch.float32,
        seed=seed,
    )


def trained(model: tuned.LanguageModel) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.hybrid.named_parameters() if p.requires_grad}


def save_stirred(model: tuned.LanguageModel, folder: Path) -> Path:
    """An artifact whose every weight is away from its start."""
    folder.mkdir()
    stir(model.hybrid, 0.05)
    tuned.save(model, trained(model), folder)
    return folder


@pytest.fixture
def artifact(random_llm: Path, tmp_path: Path) -> Path:
    return save_stirred(build(random_llm), tmp_path / "artifact")


@torch.no_grad()
def test_plain_peft_gives_the_same_logits(backbone_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = build(backbone_folder)
    folder = save_stirred(model, tmp_path / "artifact")
    plain = load_backbone(backbone_folder, torch.float32)
    ids = torch.tensor([model.encoder.prompt([1, 2], [3, 4, 5], 0).tokens.ids])
    untuned = plain(ids).logits
    theirs = PeftModel.from_pretrained(plain, folder)(ids).logits
    ours = model.hybrid.llm.eval()(ids).logits
    assert torch.equal(ours, theirs)
    assert (ours - untuned).abs().max() > 1e-2


def test_round_trip(random_llm: Path, tmp_path: Path) -> None:
    model = build(random_llm)
    folder = save_stirred(model, tmp_path / "artifact")
    other = build(random_llm, seed=1)
    before = {name: tensor.clone() for name, tensor in trained(other).items()}
    tuned.load(other, folder)
    after, expected = trained(other), trained(model)
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor), name
        assert not torch.equal(before[name], tensor), name
    assert ItemEmbeddings.load(folder).source == ITEMS.source
    assert torch.equal(ItemEmbeddings.load(folder).table_IE, ITEMS.table_IE)


def test_stage_2_starts_from_a_text_adapter(random_llm: Path, tmp_path: Path) -> None:
    text = build(random_llm, "text")
    folder = save_stirred(text, tmp_path / "text")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    unified = build(random_llm, seed=1)
    fresh = {name: tensor.clone() for name, tensor in trained(unified).items()}
    tuned.load(unified, folder)
    for name, tensor in trained(unified).items():
        expected = trained(text).get(name, fresh[name])
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    "overrides", [{"backbone.lora_rank": 4}, {"projector.hidden": 8}, {"projector.depth": 2}]
)
def test_another_shape_is_refused(
    artifact: Path, random_llm: Path, overrides: dict[str, int]
) -> None:
    with pytest.raises(CheckpointError, match=r"artifact does not fit"):
        tuned.load(build(random_llm, **overrides), artifact)


@pytest.mark.parametrize("target", ["q_proj", "v_proj"])
def test_other_adapted_layers_are_refused(artifact: Path, random_llm: Path, target: str) -> None:
    model = build(random_llm, **{"backbone.lora_targets": [target]})
    with pytest.raises(CheckpointError, match=r"does not fit this backbone: .* unexpected"):
        tuned.load(model, artifact)


@pytest.mark.parametrize("name", [tuned.ADAPTER, tuned.PROJECTOR])
def test_a_damaged_file_is_refused(artifact: Path, random_llm: Path, name: str) -> None:
    os.truncate(artifact / name, 100)
    with pytest.raises(CheckpointError, match="artifact does not fit"):
        tuned.load(build(random_llm), artifact)


def test_a_folder_without_adapter_is_refused(random_llm: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train it again"):
        tuned.load(build(random_llm), tmp_path)


def test_unified_prompts_need_items(random_llm: Path) -> None:
    with pytest.raises(ConfigError, match="item table"):
        tuned.build(SMALL, "unified", random_llm, DATA, None, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fitting_backbone_is_taken_and_nothing_is_disturbed(
    backbone_folder: Path, dtype: torch.dtype
) -> None:
    """Fresh adapters are what the seed says, as if nothing had been checked before."""
    model = tuned.build(SMALL, "text", backbone_folder, DATA, None, dtype=dtype, seed=5)
    torch.manual_seed(5)
    expected = attach_lora(load_backbone(backbone_folder, dtype), SMALL.backbone)
    state = model.hybrid.llm.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def unfit(name: str, vocab_size: int) -> tuple[Any, Any]:
    """Class and config of a model whose candidates cannot be scored in one pass."""
    import transformers as hf

    common = {"vocab_size": vocab_size, "hidden_size": 32, "initializer_range": 0.3}
    llama = {**common, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    makers: dict[str, tuple[Any, Any]] = {
        "logit scaling": (
            hf.GraniteForCausalLM,
            hf.GraniteConfig(**llama, num_key_value_heads=2, logits_scaling=4.0),
        ),
        "soft-capped logits": (
            hf.Gemma2ForCausalLM,
            hf.Gemma2Config(**llama, num_key_value_heads=2, head_dim=8),
        ),
        "sliding window": (
            hf.MistralForCausalLM,
            hf.MistralConfig(**llama, num_key_value_heads=2, sliding_window=8),
        ),
        "ALiBi": (hf.FalconForCausalLM, hf.FalconConfig(**llama, alibi=True)),
        "recurrent": (hf.MambaForCausalLM, hf.MambaConfig(**common, num_hidden_layers=2)),
    }
    return makers[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logit scaling", "cannot rank candidates in one pass"),
        ("sliding window", "cannot rank candidates in one pass"),
        ("ALiBi", "cannot rank candidates in one pass"),
        ("soft-capped logits", "cannot load backbone"),
        ("recurrent", "cannot load backbone"),
    ],
)
def test_a_backbone_that_cannot_rank_in_one_pass_is_refused(
    name: str, message: str, random_llm: Path, tmp_path: Path
) -> None:
    """By its scores, or because it lacks the attention that takes a mask."""
    folder = save_model(*unfit(name, vocabulary_size(random_llm)), random_llm, tmp_path / "llm")
    with pytest.raises(ConfigError, match=message) as caught:
        build(folder, "text")
    assert str(folder) in str(caught.value)


def test_a_backbone_that_answers_by_letter_is_built(random_llm: Path) -> None:
    letters = {"prompt.answer": "letter", "stage1.loss.alpha": 0.0, "stage2.loss.alpha": 0.0}
    assert build(random_llm, "text", **letters).encoder.answers([3])[0] != []
