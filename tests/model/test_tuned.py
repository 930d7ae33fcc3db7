"""The tuned artifact: plain peft reads it, it round-trips, and what does not fit is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    DATA,
    ITEM_WIDTH,
    TITLES,
    make_batch,
    make_rows,
    save_mistral,
    save_model,
    stir,
    vocabulary_size,
)

from rsllm.config import Experiment, LossConfig, Representation
from rsllm.config.plain import replace_in
from rsllm.errors import CheckpointError, ConfigError
from rsllm.model import tuned
from rsllm.model.backbone import attach_lora, load_backbone, load_tokenizer
from rsllm.model.objective import LanguageObjective
from rsllm.model.projector import mean_embeddings
from rsllm.recommenders.embeddings import ItemEmbeddings

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


FULL = {"backbone.tuning": "full"}


@torch.no_grad()
def test_plain_transformers_loads_a_fully_tuned_backbone(
    backbone_folder: Path, tmp_path: Path
) -> None:
    model = build(backbone_folder, **FULL)
    assert all(parameter.requires_grad for parameter in model.hybrid.parameters())
    folder = save_stirred(model, tmp_path / "artifact")
    ids = torch.tensor([model.encoder.prompt([1, 2], [3, 4, 5], 0).tokens.ids])
    ours = model.hybrid.llm.eval()(ids).logits
    assert torch.equal(load_backbone(folder, torch.float32)(ids).logits, ours)
    assert (
        load_tokenizer(folder)("Heat")["input_ids"] == model.encoder.tokenizer("Heat")["input_ids"]
    )
    untuned = load_backbone(backbone_folder, torch.float32)(ids).logits
    assert (ours - untuned).abs().max() > 1e-2

    text, unified = (build(backbone_folder, x, seed=1, **FULL) for x in ("text", "unified"))
    for other in (text, unified):
        tuned.load(other, folder)
        assert torch.equal(other.hybrid.llm.eval()(ids).logits, ours)
    expected = trained(model)
    for name, tensor in trained(unified).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_full_model_and_an_adapter_do_not_fit_each_other(
    artifact: Path, random_llm: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="artifact does not fit"):
        tuned.load(build(random_llm, **FULL), artifact)
    whole = save_stirred(build(random_llm, **FULL), tmp_path / "whole")
    with pytest.raises(CheckpointError, match="whole does not fit"):
        tuned.load(build(random_llm), whole)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_recomputed_activations_give_equal_gradients(backbone_folder: Path, tuning: str) -> None:
    gradients, calls = [], [0, 0]
    for recompute in (False, True):
        settings = {"backbone.tuning": tuning, "backbone.gradient_checkpointing": recompute}
        model = build(backbone_folder, **settings)
        stir(model.hybrid, 0.02)
        torch.manual_seed(0)
        objective = LanguageObjective(model.hybrid.train(), LossConfig(alignment=0.1))
        for module in model.hybrid.llm.modules():
            module.register_forward_hook(partial(count, calls, int(recompute)))
        loss, _ = objective(make_batch(model.encoder, make_rows(3)))
        loss.backward()
        gradients.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert calls[1] > 1.5 * calls[0]


def count(calls: list[int], kind: int, *_: Any) -> None:
    calls[kind] += 1


def test_the_projector_starts_at_the_titles(random_llm: Path) -> None:
    model, random = (build(random_llm, **{"projector.start": x}) for x in ("titles", "random"))
    assert model.hybrid.slots is not None
    assert random.hybrid.slots is not None
    table_VD = model.hybrid.backbone.get_input_embeddings().weight
    titles_ID = mean_embeddings(table_VD, model.encoder.title_ids)
    items_IE = ITEMS.standardised()
    expected = random.hybrid.slots.projector
    expected.start_at_titles(items_IE, titles_ID)
    assert torch.equal(model.hybrid.slots.projector(items_IE), expected(items_IE))


def test_shuffled_slots_hold_other_items_vectors_and_the_artifact_keeps_the_table(
    random_llm: Path, tmp_path: Path
) -> None:
    plain_IE = ITEMS.standardised()
    model = build(random_llm, **{"projector.shuffle_items": True})
    assert model.hybrid.slots is not None
    shown_IE = model.hybrid.slots.items_IE
    assert not (shown_IE == plain_IE).all(dim=1).any(), "every slot holds another"
    torch.testing.assert_close(shown_IE.sort(dim=0)[0], plain_IE.sort(dim=0)[0])
    folder = save_stirred(model, tmp_path / "artifact")
    assert torch.equal(ItemEmbeddings.load(folder).table_IE, ITEMS.table_IE)
    folds = replace(ITEMS, fold_tables=(2 * ITEMS.table_IE,)).shuffled()
    assert torch.equal(folds.fold_tables[0], 2 * folds.table_IE)


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


def test_attention_without_sdpa_takes_the_mask_too(random_llm: Path, tmp_path: Path) -> None:
    import transformers as hf

    config = hf.Gemma2Config(
        vocab_size=vocabulary_size(random_llm),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=None,
        initializer_range=0.3,
    )
    folder = save_model(hf.Gemma2ForCausalLM, config, random_llm, tmp_path / "llm")
    assert build(folder, "text").hybrid.backbone.config._attn_implementation == "eager"


LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SCALED = {
    "Granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8},
}
SEPARATE = {
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "Falcon": {"alibi": True},
    "Bloom": {},
    "Mamba": {},
}


def odd_backbone(name: str, settings: dict[str, Any], vocabulary: Path, folder: Path) -> Path:
    import transformers as hf

    config = getattr(hf, f"{name}Config")(
        vocab_size=vocabulary_size(vocabulary),
        hidden_size=32,
        initializer_range=0.3,
        **(LLAMA | settings),
    )
    return save_model(getattr(hf, f"{name}ForCausalLM"), config, vocabulary, folder)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_or_capped_logits_are_refused(name: str, random_llm: Path, tmp_path: Path) -> None:
    folder = odd_backbone(name, SCALED[name], random_llm, tmp_path / "llm")
    with pytest.raises(ConfigError, match="output head alone") as caught:
        build(folder, "text")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", SEPARATE)
def test_a_backbone_without_one_pass_is_warned_of_once(
    name: str, random_llm: Path, tmp_path: Path
) -> None:
    folder = odd_backbone(name, SEPARATE[name], random_llm, tmp_path / "llm")
    targets = {"backbone.lora_targets": ["in_proj"]} if name == "Mamba" else {}
    with pytest.warns(UserWarning, match="cannot rank candidates in one pass") as caught:
        model = build(folder, "text", **targets)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert not model.hybrid.one_pass
    LanguageObjective(model.hybrid, LossConfig(gamma=1.0, scorer="pointer"))
    with pytest.raises(ConfigError, match=r"loss.gamma is 1.0.*pointer"):
        LanguageObjective(model.hybrid, LossConfig(gamma=1.0))


def test_a_window_shorter_than_the_prompts_rules_out_one_pass(
    random_llm: Path, tmp_path: Path
) -> None:
    """However short the prompts are that are compared."""
    folder = save_mistral(tmp_path / "llm", random_llm, window=900)
    assert build(folder, "text", **{"prompt.max_tokens": 800}).hybrid.one_pass
    with pytest.warns(UserWarning, match="window is 900 tokens"):
        assert not build(folder, "text").hybrid.one_pass


def test_a_backbone_that_answers_by_letter_is_built(random_llm: Path) -> None:
    letters = {"prompt.answer": "letter", "stage1.loss.alpha": 0.0, "stage2.loss.alpha": 0.0}
    assert build(random_llm, "text", **letters).encoder.answers([3])[0] != []
