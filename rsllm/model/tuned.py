"""A tuned language model as a folder: a peft adapter, the projector and the items it projects.

`adapter_config.json` and `adapter_model.safetensors` load with plain peft; `projector.safetensors`
holds projector and marker, `items.safetensors` the recommender's frozen item table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsllm.config import BackboneConfig, Experiment, Representation
from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError, ConfigError
from rsllm.model.backbone import attach_lora, context_length, load_backbone, load_tokenizer
from rsllm.model.branches import branch_scores
from rsllm.model.hybrid import HybridLM, ItemSlots
from rsllm.prompts.collate import Row, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.recommenders.embeddings import ItemEmbeddings

PROJECTOR = "projector.safetensors"
ADAPTER = "adapter_model.safetensors"
_ADAPTER_PREFIX, _SLOTS_PREFIX = "llm.", "slots."
_CHECK_TITLES = ("Heat", "The Long Way Home")
ONE_PASS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}
"""Largest difference, relative or absolute, between one-pass and plain candidate scores."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A hybrid LM with the encoder that writes its prompts."""

    hybrid: HybridLM
    encoder: PromptEncoder
    source: BackboneConfig
    items: ItemEmbeddings | None = None
    """What the slots project; None for text prompts."""


def build(
    experiment: Experiment,
    representation: Representation,
    backbone: str | Path,
    data: PreparedData,
    items: ItemEmbeddings | None,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    lora: bool = True,
) -> LanguageModel:
    """Backbone, fresh LoRA (unless `lora` is off) and, for unified prompts, fresh slots.

    Raises:
        ConfigError: the backbone cannot be loaded, its context is too short for any prompt, or
            it cannot rank candidates in one pass.
    """
    torch.manual_seed(seed)
    llm = load_backbone(backbone, dtype)
    tokenizer = load_tokenizer(backbone)
    room = context_length(llm) - experiment.prompt.max_title_tokens - 1
    if room < 16:
        raise ConfigError(f"backbone {backbone} has a context of {context_length(llm)} tokens only")
    prompt = replace(experiment.prompt, max_tokens=min(experiment.prompt.max_tokens, room))
    _check_one_pass(llm, PromptEncoder(tokenizer, _CHECK_TITLES, prompt, "text", "item"), backbone)
    slots = None
    if representation == "unified":
        if items is None:
            raise ConfigError("unified prompts need the item table of a recommender")
        embeddings_VD = llm.get_input_embeddings().weight.detach()
        slots = ItemSlots(items.standardised(), embeddings_VD, experiment.projector)
    hybrid = HybridLM(attach_lora(llm, experiment.backbone) if lora else llm, slots)
    encoder = PromptEncoder(tokenizer, data.titles, prompt, representation, data.domain)
    return LanguageModel(hybrid, encoder, experiment.backbone, items if slots else None)


def _check_one_pass(llm: Any, encoder: PromptEncoder, backbone: str | Path) -> None:
    """Refuse a backbone that scores candidates otherwise in one pass than one by one."""
    row = Row(history=[1], candidates=[0, 1], target=0, user=0)
    tolerance = ONE_PASS_TOLERANCE[llm.dtype]
    reason = "the scores differ from a plain forward's"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            one_pass_C, plain_C = _one_pass_scores(llm, encoder, row), _scores(llm, encoder, row)
        fits = torch.allclose(one_pass_C, plain_C, rtol=tolerance, atol=tolerance)
    except (RuntimeError, TypeError, ValueError) as error:
        fits, reason = False, str(error)
    if not fits:
        raise ConfigError(
            f"backbone {backbone}: its attention cannot rank candidates in one pass (sliding"
            " window, ALiBi, recurrent or logit scaling); use a Llama-, Qwen-, GPT-2- or"
            f" Mistral-like model ({reason})"
        )


def _one_pass_scores(llm: Any, encoder: PromptEncoder, row: Row) -> Tensor:
    model = HybridLM(llm, slots=None)
    batch = collate([row], encoder, np.arange(len(_CHECK_TITLES)), all_branches=True)
    scores_BC = branch_scores(model.label_log_probs(model.states(batch), batch), batch)
    return scores_BC[0]


def _scores(llm: Any, encoder: PromptEncoder, row: Row) -> Tensor:
    """One plain sequence per candidate, without mask and position ids. [C]."""
    prompt = encoder.prompt(row.history, row.candidates, row.template).tokens.ids
    scores = []
    for own in encoder.answers(row.candidates):
        answer = own + encoder.ending
        logits_TV = llm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        scores.append(logits_TV.log_softmax(-1)[range(len(answer)), answer].sum())
    return torch.stack(scores)


def save(model: LanguageModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapter and projector from gathered tensors named as in `HybridLM`."""
    llm: Any = model.hybrid.llm
    llm.peft_config["default"].base_model_name_or_path = model.source.source
    llm.save_pretrained(
        folder,
        state_dict=_without_prefix(tensors, _ADAPTER_PREFIX),
        save_embedding_layers=False,
    )
    (folder / "README.md").unlink(missing_ok=True)
    slots = _without_prefix(tensors, _SLOTS_PREFIX)
    if model.items is not None:
        save_file(slots, folder / PROJECTOR)
        model.items.save(folder)


def load(model: LanguageModel, folder: Path) -> None:
    """Load adapter and, if both have one, projector into a model of the same configuration.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model.hybrid.llm, load_file(folder / ADAPTER))
        if model.hybrid.slots is not None and (folder / PROJECTOR).exists():
            model.hybrid.slots.load_state_dict(load_file(folder / PROJECTOR))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} does not fit this model or is damaged: {error}; train it again"
        ) from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit this backbone: {len(missing)} adapter tensors missing,"
            f" {len(result.unexpected_keys)} unexpected"
        )


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
