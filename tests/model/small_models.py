"""Small worlds for the model tests: titles, rows, and language models that fit in a blink."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rsllm.config import (
    BackboneConfig,
    CatalogueConfig,
    Form,
    LossConfig,
    ProjectorConfig,
    PromptConfig,
    Representation,
)
from rsllm.data.sequences import Catalogue
from rsllm.model.backbone import attach_lora, load_backbone
from rsllm.model.catalogue import CatalogueHead, ItemKeys
from rsllm.model.history import HistoryObjective
from rsllm.model.hybrid import HybridLM, ItemSlots
from rsllm.prompts.collate import Batch, Row, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.prompts.histories import HistoryBatch, Whole, collate_histories

TITLES = (
    "Heat",
    "Heat 2",
    "Golden Garden (1996)",
    "The Last Voyage (1996)",
    "Heat",
    "Quiet Orchestra",
    "</s>",
    "Secret Letter (1987)",
    "Winter",
    "The Broken Harbor",
    "Matrix, The (1999)",
    "Garden",
)
CATALOGUE = Catalogue.of(TITLES, np.arange(len(TITLES)))
DATA: Any = SimpleNamespace(titles=list(TITLES), domain="movie", catalogue=CATALOGUE)
"""What a model asks of a prepared data set."""
TITLE_KEYS = np.unique(TITLES, return_inverse=True)[1]
ITEM_WIDTH, TITLE_WIDTH = 8, 6


def make_rows(num_rows: int, num_candidates: int = 4, seed: int = 0) -> list[Row]:
    """Rows with histories of one to six items, few users, and the target at any place."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        history = rng.choice(len(TITLES), rng.integers(1, 7), replace=False).tolist()
        candidates = rng.choice(len(TITLES), num_candidates, replace=False).tolist()
        target = candidates[rng.integers(num_candidates)]
        user, template = (int(n) for n in rng.integers([4, 3]))
        rows.append(Row(history, candidates, target, user, template))
    return rows


def make_encoder(
    tokenizer: Any, representation: Representation, form: Form = "choice", **prompt: Any
) -> PromptEncoder:
    return PromptEncoder(tokenizer, TITLES, PromptConfig(**prompt), representation, "movie", form)


def make_batch(encoder: PromptEncoder, rows: list[Row], **settings: Any) -> Batch:
    """All branches, unless said otherwise."""
    return collate(rows, encoder, TITLE_KEYS, **{"all_branches": True, **settings})


def make_model(llm: Any) -> HybridLM:
    """`llm` with slots whose every weight is away from its start."""
    torch.manual_seed(1)
    items_IE = torch.randn(len(TITLES), ITEM_WIDTH)
    table_VD = llm.get_input_embeddings().weight
    slots = ItemSlots(items_IE, table_VD, ProjectorConfig(hidden=16))
    stir(slots, float(table_VD.std()))
    return HybridLM(llm, slots)


def make_trainable(folder: Path) -> HybridLM:
    """The backbone in `folder` with LoRA and slots, as in the midst of training."""
    torch.manual_seed(2)
    llm = attach_lora(load_backbone(folder, torch.float32), BackboneConfig(lora_rank=4))
    stir(llm, 0.05)
    return make_model(llm)


def make_histories(num_rows: int, seed: int = 0, *, tables: int = 1) -> list[Row]:
    """Histories of one to six items, some of them more than once, and what came next."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        *history, target = rng.integers(len(TITLES), size=rng.integers(2, 8)).tolist()
        rows.append(Row(history, (), target, number, int(rng.integers(3)), number % tables))
    return rows


def make_history_objective(
    folder: Path, loss: LossConfig, *, slots: bool = True, tables: int = 1, **catalogue: Any
) -> HistoryObjective:
    """`make_trainable` with a catalogue scorer, on so many item tables, all in the midst of it."""
    model = make_trainable(folder)
    if not slots:
        model.slots = None
    elif model.slots is not None:
        model.slots.items_IE = torch.randn(tables * len(TITLES), ITEM_WIDTH)
    titles_IF = torch.randn(len(TITLES), TITLE_WIDTH)
    titles_IF[TITLES.index("</s>")] = 0  # a title unlike any other
    items_XE = None if model.slots is None else model.slots.items_IE
    keys = ItemKeys(items_XE, titles_IF, CATALOGUE, CatalogueConfig(**catalogue))
    model.catalogue = CatalogueHead(keys, model.backbone.get_input_embeddings().weight.shape[1])
    stir(model.catalogue, 0.05)
    return HistoryObjective(model, loss)


def make_history_batch(
    rows: list[Row], encoder: PromptEncoder, whole: Whole | None = None, *, sampled: bool = False
) -> HistoryBatch:
    whole = whole or Whole.of(rows, encoder, CATALOGUE.counts_I, sampled=sampled)
    return collate_histories(rows, encoder, len(TITLES), whole)


def stir(module: torch.nn.Module, scale: float) -> None:
    """Move what trains by noise."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def save_gpt2(folder: Path, vocabulary: Path, positions: int = 400) -> Path:
    """A random GPT-2 (learned positions, Conv1D layers) with the tokenizer in `vocabulary`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary_size(vocabulary),
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
    )
    return save_model(GPT2LMHeadModel, config, vocabulary, folder)


def save_qwen2(folder: Path, vocabulary: Path) -> Path:
    """A random Qwen2 (untied head, attention biases) with the tokenizer in `vocabulary`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return save_model(Qwen2ForCausalLM, Qwen2Config(**_shape(vocabulary)), vocabulary, folder)


def _shape(vocabulary: Path) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary_size(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }


def save_mistral(folder: Path, vocabulary: Path, window: int | None = None) -> Path:
    """A random Mistral, with or without a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=vocabulary_size(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.3,
    )
    return save_model(MistralForCausalLM, config, vocabulary, folder)


def save_bloom(folder: Path, vocabulary: Path) -> Path:
    """A random Bloom (ALiBi, no SDPA)."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=vocabulary_size(vocabulary),
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
    )
    return save_model(BloomForCausalLM, config, vocabulary, folder)


def vocabulary_size(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).vocab_size)


def save_model(model: Any, config: Any, vocabulary: Path, folder: Path) -> Path:
    """A random model of that class with the tokenizer in `vocabulary`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    for file in vocabulary.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
