"""A tuned language model as a folder: a peft adapter, the projector and the items it projects.

`adapter_config.json` and `adapter_model.safetensors` load with plain peft; `projector.safetensors`
holds projector and marker, `items.safetensors` the recommender's frozen item table.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
            its output head cannot score candidates.
    """
    torch.manual_seed(seed)
    llm = load_backbone(backbone, dtype)
    tokenizer = load_tokenizer(backbone)
    room = context_length(llm) - experiment.prompt.max_title_tokens - 1
    if room < 16:
        raise ConfigError(f"backbone {backbone} has a context of {context_length(llm)} tokens only")
    prompt = replace(experiment.prompt, max_tokens=min(experiment.prompt.max_tokens, room))
    check = PromptEncoder(tokenizer, _CHECK_TITLES, prompt, "text", "item")
    one_pass = ranks_in_one_pass(llm, check, backbone)
    slots = None
    if representation == "unified":
        if items is None:
            raise ConfigError("unified prompts need the item table of a recommender")
        embeddings_VD = llm.get_input_embeddings().weight.detach()
        slots = ItemSlots(items.standardised(), embeddings_VD, experiment.projector)
    hybrid = HybridLM(
        attach_lora(llm, experiment.backbone) if lora else llm, slots, one_pass=one_pass
    )
    encoder = PromptEncoder(tokenizer, data.titles, prompt, representation, data.domain)
    return LanguageModel(hybrid, encoder, experiment.backbone, items if slots else None)


def ranks_in_one_pass(llm: Any, encoder: PromptEncoder, backbone: str | Path) -> bool:
    """Whether one pass scores candidates as plain forwards do; warns where it does not.

    ALiBi counts tokens instead of positions, a sliding window gives way to the branches' mask, and
    recurrent layers take no mask: such backbones pass over every candidate separately.

    Raises:
        ConfigError: not even separate passes do: what the output head says is not the whole of a
            logit (it is scaled or capped), so ranking and generation would disagree.
    """
    config, window = encoder.config, getattr(llm.config.get_text_config(), "sliding_window", None)
    row = Row(history=[1], candidates=[0, 1], target=0, user=0)
    separate = [replace(row, target=item) for item in row.candidates]
    if reason := _misfit(llm, encoder, row, separate, all_branches=False):
        raise ConfigError(
            f"backbone {backbone}: its output head alone does not give its token probabilities"
            f" ({reason}); use a model without logit scaling, such as a Llama-, Qwen-, GPT-2- or"
            " Mistral-like one"
        )
    if window and window < config.max_tokens + config.max_title_tokens:
        reason = (
            f"its attention window is {window} tokens, prompt.max_tokens is {config.max_tokens}"
        )
    else:
        reason = _misfit(llm, encoder, row, [row], all_branches=True)
    if reason:
        warnings.warn(
            f"backbone {backbone} cannot rank candidates in one pass ({reason}); every candidate"
            " takes a pass of its own, which is much slower",
            stacklevel=3,
        )
    return not reason


def _misfit(
    llm: Any, encoder: PromptEncoder, row: Row, rows: Sequence[Row], *, all_branches: bool
) -> str:
    """How the scores of `row`'s candidates, laid out as `rows`, differ from a plain forward's."""
    tolerance = ONE_PASS_TOLERANCE[llm.dtype]
    model, keys_I = HybridLM(llm, slots=None), np.arange(len(_CHECK_TITLES))
    try:
        batch = collate(rows, encoder, keys_I, all_branches=all_branches)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            scores_BC = branch_scores(model.label_log_probs(model.states(batch), batch), batch)
            plain_C = _scores(llm, encoder, row)
        fits = torch.allclose(scores_BC.flatten(), plain_C, rtol=tolerance, atol=tolerance)
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "" if fits else "the scores differ from a plain forward's"


def _scores(llm: Any, encoder: PromptEncoder, row: Row) -> Tensor:
    """One plain sequence per candidate, without mask and position ids. [C]."""
    prompt = encoder.prompt(row.history, row.candidates, row.template).tokens.ids
    scores = []
    for item in row.candidates:
        answer = [*encoder.title_ids[item], encoder.terminator]
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
