"""`Experiment`: everything a run depends on, as frozen dataclasses that refuse bad values.

An experiment is plain data: it round-trips through JSON, has a content hash, and variants of it
are written as paths: ``replace_in(base, {"stage2.loss.alpha": 0.1})``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from rsllm.errors import ConfigError

T = TypeVar("T")

Representation = Literal["text", "unified"]
Scorer = Literal["likelihood", "pointer"]
Precision = Literal["auto", "fp32", "bf16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _at_least(low: float, config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(low <= value < math.inf, f"{section}.{name} is {value}; it must be at least {low}")


def _positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < math.inf, f"{section}.{name} is {value}; it must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which interactions, and how they become windows, splits and candidate sets."""

    source: str = "movielens-100k"
    """A data set name (see `rsllm fetch`), `synthetic`, or a folder with its raw files."""
    min_rating: float = 3.0
    """Interactions rated lower are dropped (LLaRA's MovieLens rule)."""
    window: int = 10
    """Longest history, in items."""
    min_history: int = 3
    """Rows with a shorter history are dropped (LLaRA's loading rule)."""
    num_candidates: int = 20
    """Size of a candidate set: the target and `num_candidates - 1` negatives."""
    train_share: float = 0.8
    """Share of users, in order of their first interaction, that train; the rest is halved."""
    num_shards: int = 4
    """Parquet files the training rows are written to."""
    max_rejected_rows: int = 0
    """Broken raw rows tolerated before `prepare` refuses."""
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(1, self, "data", "window", "num_shards")
        _at_least(0, self, "data", "max_rejected_rows", "seed")
        _require(
            1 <= self.min_history <= self.window,
            f"data.min_history is {self.min_history}; choose 1 to data.window = {self.window}",
        )
        _require(
            self.num_candidates >= 2,
            f"data.num_candidates is {self.num_candidates}; a choice needs at least 2",
        )
        _require(
            0 < self.train_share < 1,
            f"data.train_share is {self.train_share}; it must lie between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommenderConfig:
    """The traditional sequential recommender whose item table fills the slots."""

    model: Literal["sasrec"] = "sasrec"
    width: int = 64
    """Width of item embeddings and hidden states."""
    num_blocks: int = 2
    num_heads: int = 1
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 256
    """Training rows per optimizer step, over all workers."""
    max_epochs: float = 10.0
    patience: int = 3
    """Validations without a better score before training stops."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("width", "num_blocks", "num_heads", "batch_size", "patience")
        _at_least(1, self, "recommender", *counts)
        _at_least(0, self, "recommender", "weight_decay", "seed")
        _positive(self, "recommender", "learning_rate", "max_epochs")
        _require(
            self.width % self.num_heads == 0,
            f"recommender.width {self.width} is not a multiple of num_heads {self.num_heads}",
        )
        _require(
            0 <= self.dropout < 1, f"recommender.dropout is {self.dropout}; it must be in [0, 1)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """The language model and its LoRA adapter."""

    source: str = "smollm2-135m-q4"
    """An asset name (see `rsllm fetch`), a local model folder, or a hub name."""
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    """Names of the adapted linear layers; empty takes every linear layer of the blocks."""

    def __post_init__(self) -> None:
        _at_least(1, self, "backbone", "lora_rank", "lora_alpha")
        _require(
            0 <= self.lora_dropout < 1,
            f"backbone.lora_dropout is {self.lora_dropout}; it must be in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """Text around the items, and length limits."""

    domain: Literal["movie"] = "movie"
    max_title_tokens: int = 24
    """Longer titles are cut, and counted."""
    max_tokens: int = 1024
    """Longest prompt; whole oldest history items are dropped until it fits, and counted."""

    def __post_init__(self) -> None:
        _at_least(1, self, "prompt", "max_title_tokens")
        _at_least(16, self, "prompt", "max_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """From recommender width to the language model's input width."""

    hidden: int = 256
    """Width of the hidden layers of the MLP beside the linear map."""
    depth: int = 1
    """Hidden layers of the MLP; 0 leaves the linear map alone."""

    def __post_init__(self) -> None:
        _at_least(1, self, "projector", "hidden")
        _at_least(0, self, "projector", "depth")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """L = (1 - alpha - beta) L_NIP + alpha L_TT + beta L_UT + gamma L_rank.

    The first three are RSLLM's; L_rank is an extension of ours, and gamma = 0 is the paper.
    """

    alpha: float = 0.1
    """Weight of the target-to-target contrast; 0 turns it off."""
    beta: float = 0.05
    """Weight of the user-to-target contrast; 0 turns it off."""
    temperature: float = 0.1
    """Temperature of both contrasts."""
    gamma: float = 0.0
    """Weight of the ranking loss over the row's candidates (ours)."""
    scorer: Scorer = "likelihood"
    """What the ranking loss ranks by: title log-probabilities, or the pointer (ours)."""

    def __post_init__(self) -> None:
        _require(
            self.alpha >= 0 and self.beta >= 0,
            f"loss.alpha {self.alpha} and loss.beta {self.beta} must not be negative",
        )
        _require(
            self.alpha + self.beta < 1,
            f"loss.alpha {self.alpha} + loss.beta {self.beta} is {self.alpha + self.beta}; the rest"
            " is the weight of the language-model loss, so keep the sum below 1",
        )
        _require(
            0 < self.temperature < math.inf,
            f"loss.temperature is {self.temperature}; it must be positive",
        )
        _at_least(0, self, "loss", "gamma")

    @property
    def contrasts(self) -> bool:
        """Whether either contrastive loss has weight."""
        return self.alpha > 0 or self.beta > 0

    @property
    def ranks_by(self) -> Scorer:
        """What candidates are ranked by: the scorer if it was trained, else the likelihood."""
        return self.scorer if self.gamma > 0 else "likelihood"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of language-model tuning: which prompts, how long, under which loss."""

    representation: Representation
    """`text`: titles only. `unified`: title, marker and projected item slot."""
    samples: int
    """Training rows seen; 0 skips the stage."""
    batch_size: int = 8
    """Training rows per optimizer step, over all workers and accumulation steps."""
    accumulation: int = 1
    """Micro-batches per optimizer step and worker. Contrasts see one micro-batch's negatives."""
    lora_learning_rate: float = 5e-4
    projector_learning_rate: float = 5e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    validations: int = 1
    """Validations (and reports to the search), evenly spaced; the last is at the end."""
    loss: LossConfig = field(default_factory=LossConfig)
    seed: int = 0
    """Seeds fresh weights, sample order, templates and training negatives."""

    def __post_init__(self) -> None:
        _at_least(0, self, "stage", "samples", "weight_decay", "seed")
        _at_least(1, self, "stage", "batch_size", "accumulation", "validations")
        rates = ("lora_learning_rate", "projector_learning_rate", "max_gradient_norm")
        _positive(self, "stage", *rates)
        _require(
            self.batch_size % self.accumulation == 0,
            f"stage.batch_size {self.batch_size} is not a multiple of"
            f" accumulation {self.accumulation}",
        )
        _require(
            0 <= self.warmup_share < 1,
            f"stage.warmup_share is {self.warmup_share}; it must be in [0, 1)",
        )
        _require(
            not (
                self.loss.gamma and self.loss.scorer == "pointer" and self.representation == "text"
            ),
            "the pointer scores candidate slots, which text prompts lack; use the likelihood"
            " scorer or unified prompts",
        )

    @property
    def steps(self) -> int:
        """Optimizer steps: samples / batch_size, rounded down."""
        return self.samples // self.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """How training is laid out. 0 and `auto` are resolved from the machine by `rsllm.plan`."""

    workers: int = 0
    """Data-parallel workers of one training run; 0 takes one (per GPU group)."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage, 0 to 3."""
    precision: Precision = "auto"
    """`bf16`: autocast on CPUs, bf16 engine on GPUs. `auto`: bf16 where the hardware has it."""
    threads: int = 0
    """Torch threads per CPU worker; 0 takes cores / workers."""

    def __post_init__(self) -> None:
        _at_least(0, self, "compute", "workers", "threads")
        _require(
            self.zero_stage in (0, 1, 2, 3),
            f"compute.zero_stage is {self.zero_stage}; choose 0, 1, 2 or 3",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How many held-out rows are scored, and how answers are decoded."""

    validation_rows: int = 0
    """Rows scored at each validation; 0 takes all."""
    test_rows: int = 0
    """Test rows ranked; 0 takes all."""
    generation_rows: int = 0
    """Test rows answered by greedy generation too; 0 takes all, -1 none."""
    max_new_tokens: int = 64
    """Token limit of a generated answer (LLaRA uses 64)."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        _at_least(0, self, "evaluation", "validation_rows", "test_rows")
        _at_least(-1, self, "evaluation", "generation_rows")
        _at_least(1, self, "evaluation", "max_new_tokens", "batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One run of the pipeline: data, recommender, backbone, two stages, evaluation."""

    data: DataConfig = field(default_factory=DataConfig)
    recommender: RecommenderConfig = field(default_factory=RecommenderConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    stage1: StageConfig = field(
        default_factory=lambda: StageConfig(representation="text", samples=4096)
    )
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(representation="unified", samples=8192)
    )
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON-ready form of a config dataclass."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a config dataclass from `to_dict`'s form.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {sorted(hints)}")
    return cls(**{key: _coerce(hints[key], value, key) for key, value in values.items()})


def _coerce(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; it is a group of settings: set one of them")
        return from_dict(hint, value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} is {value!r}; choose one of {list(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f'{name} is {value!r}; expected a list, such as ["q_proj"]')
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} is {value!r}; expected {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be finite")
    return value


def replace_in(config: T, overrides: Mapping[str, Any]) -> T:
    """A copy of `config` with the values at dotted paths replaced, validated as a whole.

    Raises:
        ConfigError: a path that does not exist, or a value its dataclass refuses.
    """
    values = to_dict(config)
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node = values
        for name in parents:
            node = node[name] if isinstance(node.get(name), dict) else {}
        if leaf not in node:
            raise ConfigError(f"{type(config).__name__} has no setting {path!r}")
        node[leaf] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return from_dict(type(config), values)


def parse_setting(text: str) -> tuple[str, Any]:
    """PATH=VALUE of `--set`; the value is JSON, or else plain text."""
    path, separator, value = text.partition("=")
    if not path or not separator:
        raise ConfigError(f"--set {text} is not of the form PATH=VALUE")
    try:
        return path, json.loads(value)
    except ValueError:
        return path, value


def content_hash(value: Any) -> str:
    """SHA-256 (first 16 hex digits) of the canonical JSON of a config or a JSON-ready value."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
