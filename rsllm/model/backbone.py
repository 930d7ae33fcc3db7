"""Load a causal language model, and choose what of it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rsllm.config import BackboneConfig
from rsllm.errors import ConfigError


def load_tokenizer(source: str | Path) -> Any:
    """The backbone's tokenizer, from a local folder or the hub."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of backbone {source}: {error}") from error


def load_backbone(source: str | Path, dtype: torch.dtype) -> Any:
    """A causal LM with safetensors weights, and SDPA attention if it can, all parameters frozen.

    Raises:
        ConfigError: nothing loadable at `source`, or weights that are damaged or incomplete.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        llm, loading = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"cannot load backbone {source}: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(f"backbone {source} lacks weights: {missing[:3]}; fetch it again")
    llm.requires_grad_(False)
    llm.config.use_cache = False
    llm.generation_config = GenerationConfig()  # how to decode is never the backbone's choice
    return llm


def context_length(llm: Any) -> int:
    """Longest sequence, in tokens, that the backbone has positions for."""
    return int(getattr(llm.config, "max_position_embeddings", 1 << 30))


def linear_layers(llm: Any) -> tuple[str, ...]:
    """Names of all linear layers but the head: what LoRA adapts by default."""
    from transformers.pytorch_utils import Conv1D

    head = llm.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return tuple(sorted(names))


def tunable(llm: Any, config: BackboneConfig) -> Any:
    """The backbone as it is tuned: with an adapter, or with every weight trainable.

    Raises:
        ConfigError: see `attach_lora`.
    """
    if config.tuning == "lora":
        llm = attach_lora(llm, config)
    else:
        llm.requires_grad_(True)
    if config.gradient_checkpointing:
        base = llm.get_base_model() if config.tuning == "lora" else llm
        base.activation_checkpointing_enable({"use_reentrant": False})
    return llm


def attach_lora(llm: Any, config: BackboneConfig) -> Any:
    """Wrap the backbone for peft; fresh adapters (B = 0) leave its outputs unchanged.

    Raises:
        ConfigError: a target name that matches no layer, which would train nothing.
    """
    from peft import LoraConfig, get_peft_model

    available = linear_layers(llm)
    targets = config.lora_targets or available
    unmatched = sorted(set(targets) - set(available))
    if unmatched:
        raise ConfigError(f"backbone.lora_targets {unmatched} match no layer of {list(available)}")
    return get_peft_model(
        llm,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
        ),
    )
