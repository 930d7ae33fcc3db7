"""Load a causal language model, and choose what of it trains."""

import json
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from rsllm.config import BackboneConfig
from rsllm.errors import ConfigError


def load_tokenizer(source: str | Path) -> Any:
    """The backbone's tokenizer, from a local folder or the hub; code that comes with it never runs.

    Raises:
        ConfigError: nothing loadable at `source`.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # whatever a stranger's files can cause
        raise _unloadable("the tokenizer of backbone", source, error) from error


def load_backbone(source: str | Path, dtype: torch.dtype, layers: int = 0) -> Any:
    """A causal LM with safetensors weights, and SDPA attention if it can, all parameters frozen.

    Args:
        source: a local folder or a hub name.
        dtype: of the weights.
        layers: how many are kept, from the lowest one; 0 keeps all.

    Raises:
        ConfigError: nothing loadable at `source`, weights that are damaged or incomplete, or fewer
            layers than are to be kept.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        _refuse_other_weights(Path(source))
        llm, loading = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a stranger's files can cause
        raise _unloadable("backbone", source, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(f"backbone {source} lacks weights: {missing[:3]}; fetch it again")
    if layers:
        _keep_layers(llm, layers, source)
    llm.requires_grad_(False)
    llm.config.use_cache = False
    llm.generation_config = GenerationConfig()  # how to decode is never the backbone's choice
    return llm


def _refuse_other_weights(folder: Path) -> None:
    """An index of shards may name any file, and transformers would unpickle one that is no tensors.

    Raises:
        ConfigError: it names a file elsewhere, or one that is not safetensors.
    """
    for index in folder.glob("*.index.json"):
        for name in json.loads(index.read_text())["weight_map"].values():
            if PurePath(name).name != name or not name.endswith(".safetensors"):
                raise ConfigError(f"{index.name} names {name!r}, which is no *.safetensors in it")


def _keep_layers(llm: Any, count: int, source: str | Path) -> None:
    """Leave the upper layers out."""
    blocks: Any = getattr(llm.get_decoder(), "layers", None)
    if blocks is None or len(blocks) < count:
        has = "none that can be left out" if blocks is None else len(blocks)
        raise ConfigError(f"backbone.layers is {count}, but {source} has {has}; choose fewer, or 0")
    llm.get_decoder().layers = blocks[:count]
    llm.config.num_hidden_layers = count


def _unloadable(what: str, source: str | Path, error: Exception) -> ConfigError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(f"cannot load {what} {source}: {lines[0]}")


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
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(llm, lora)
