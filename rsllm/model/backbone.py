"""Load a causal language model, and choose what of it trains."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rsllm.config import BackboneConfig, Experiment
from rsllm.errors import ConfigError
from rsllm.model.dropout import share_dropout
from rsllm.model.files import (
    check_weights,
    first_line,
    has_tokenizer,
    has_weights,
    read_config,
    refusal,
)
from rsllm.prompts.encode import UNLIMITED, PromptEncoder, control_ids


def check_backbone(folder: str | Path, experiment: Experiment, *, weights: bool = True) -> Any:
    """Find out before anything is prepared whether a folder can be the backbone.

    Args:
        folder: as `resolve_backbone` finds it.
        experiment: whose shortest prompts have to fit.
        weights: whether they have to be there; one can plan for a model before it is.

    Returns:
        The config of its text model.

    Raises:
        ConfigError: it cannot; no weight was read.
    """
    folder = Path(folder)
    config = read_config(folder)
    if weights or has_weights(folder):
        check_weights(folder)
    elif not has_tokenizer(folder):
        return config
    tokenizer = _known_tokenizer(folder)
    largest = max({*tokenizer.get_vocab().values()} - control_ids(tokenizer), default=0)
    if largest >= config.vocab_size:
        both = f"its tokenizer has ids up to {largest}, and its config {config.vocab_size} tokens"
        raise refusal(folder, f"{both}; fetch both of one model")
    kept, has = experiment.backbone.layers, config.num_hidden_layers
    if kept > has:
        raise refusal(folder, f"backbone.layers is {kept}, and it has {has}; choose fewer, or 0")
    titles = ["a"] * experiment.data.num_candidates  # the shortest that there can be
    prompt, positions = experiment.prompt, context_length(config)
    stages = (experiment.stage1, experiment.stage2)
    asked = dict.fromkeys((s.representation, s.prompts) for s in stages if s.steps)
    for written, form in asked:
        encoder = PromptEncoder(
            tokenizer, titles, prompt, written, "item", form=form, positions=positions
        )
        for template in range(len(encoder.templates)):
            encoder.prompt([0], range(len(titles)), template)
    return config


def load_tokenizer(folder: str | Path) -> Any:
    """The backbone's tokenizer; code that comes with it never runs.

    Raises:
        ConfigError: there is none, or none that prompts can be written with.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise refusal(folder, "it has no tokenizer; fetch it again with all its files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if tokenizer("a", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except Exception as error:  # whatever a stranger's files can cause
        raise refusal(folder, f"its tokenizer: {first_line(error)}") from error
    raise refusal(folder, "its tokenizer knows no letter; fetch it again")


_known_tokenizer = lru_cache(maxsize=1)(load_tokenizer)
"""For the many checks of a search."""


def load_backbone(folder: str | Path, dtype: torch.dtype, layers: int = 0) -> Any:
    """A causal LM with safetensors weights, and fast attention if it can, all parameters frozen.

    Args:
        folder: with its files.
        dtype: of the weights.
        layers: how many are kept, from the lowest one; 0 keeps all.

    Raises:
        ConfigError: nothing loadable in the folder, weights that are damaged or incomplete, or
            fewer layers than are to be kept.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from rsllm.model.attention import attend_by_products

    try:
        check_weights(Path(folder))
        llm, loading = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        llm = _text_model(llm)
    except ConfigError:
        raise
    except Exception as error:  # whatever a stranger's files can cause
        raise refusal(folder, first_line(error)) from error
    if missing := sorted(loading["missing_keys"]):
        raise refusal(folder, f"it lacks weights: {missing[:3]}; fetch it again")
    if layers:
        _keep_layers(llm, layers, folder)
    attend_by_products(llm)
    llm.requires_grad_(False)
    llm.config.use_cache = False
    llm.generation_config = GenerationConfig()  # how to decode is never the backbone's choice
    return llm


def _text_model(llm: Any) -> Any:
    """Of a model of text and images what reads text, as the causal LM that it is by itself."""
    from transformers import AutoModelForCausalLM

    config = llm.config.get_text_config(decoder=True)
    if config is llm.config:
        return llm
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config, dtype=llm.dtype, trust_remote_code=False)
    setattr(text, text.base_model_prefix, llm.get_decoder())
    text.set_output_embeddings(llm.get_output_embeddings())
    return text


def _keep_layers(llm: Any, count: int, folder: str | Path) -> None:
    """Leave the upper layers out."""
    blocks: Any = getattr(llm.get_decoder(), "layers", None)
    if blocks is None or len(blocks) < count:
        has = "none that can be left out" if blocks is None else len(blocks)
        raise refusal(folder, f"backbone.layers is {count}, and it has {has}; choose fewer, or 0")
    llm.get_decoder().layers = blocks[:count]
    llm.config.num_hidden_layers = count
    if kinds := getattr(llm.config, "layer_types", None):  # a config of more kinds is not read
        llm.config.layer_types = kinds[:count]


def context_length(config: Any) -> int:
    """Longest sequence, in tokens, that a model of that config has positions for."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    return int(positions) if positions > 0 else UNLIMITED


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
    adapted = get_peft_model(llm, lora)
    share_dropout(adapted, config.lora_dropout)
    return adapted
