"""`Experiment`: everything a run depends on, as frozen dataclasses that refuse bad values.

An experiment is plain data: it round-trips through JSON, has a content hash, and variants of it
are written as paths: ``replace_in(base, {"stage2.loss.alpha": 0.1})``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rsllm.errors import ConfigError

Representation = Literal["text", "unified"]
Scorer = Literal["likelihood", "pointer"]
Precision = Literal["auto", "fp32", "bf16"]
Domain = Literal["movie", "game", "artist", "item"]
TimeUnit = Literal["seconds", "milliseconds", "iso8601"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _at_least(low: float, config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(low <= value < math.inf, f"{section}.{name} is {value}; it must be at least {low}")


def _below_one(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < 1, f"{section}.{name} is {value}; it must be in [0, 1)")


def _positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < math.inf, f"{section}.{name} is {value}; it must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """Names of the columns of a table that no known layout describes."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    rating: str = ""
    """Empty: interactions carry no rating, and `data.min_rating` is not applied."""
    title: str = "title"
    text: tuple[str, ...] = ()
    """Columns whose words follow the title in parentheses, such as genres."""
    split: str = ""
    """Column that says train, validation or test, the same for all rows of a user."""
    items: str = ""
    """File or folder of item titles; empty: the titles stand beside the interactions."""
    time_unit: TimeUnit = "seconds"
    encoding: str = "utf-8"
    domain: Domain = "item"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which interactions, and how they become windows, splits and candidate sets."""

    source: str = "movielens-100k"
    """A data set name (see `rsllm fetch`), `synthetic`, or a file, folder or URI of raw data."""
    table: TableConfig = field(default_factory=TableConfig)
    """Columns of a raw file or folder in no known layout."""
    min_rating: float = 3.0
    """Interactions rated lower are dropped (LLaRA's MovieLens rule)."""
    duplicates: Literal["event", "first", "last", "keep"] = "event"
    """Of equal (user, item, time) keep one; of equal (user, item) the first or last; keep all."""
    min_user_events: int = 1
    """k-core: users with fewer interactions are dropped, and so on to a fixed point ..."""
    min_item_events: int = 0
    """... with items that have fewer; 0 keeps items that nobody interacted with."""
    window: int = 10
    """Longest history of a row, in items."""
    min_history: int = 3
    """Rows with a shorter history are dropped (LLaRA's loading rule)."""
    max_history: int = 0
    """Most recent interactions of a user that are used at all; 0 uses all."""
    split: Literal["user", "leave-one-out", "time", "given"] = "user"
    """By user, as LLaRA; each user's last two interactions; two cuts in time; the source's own."""
    train_share: float = 0.8
    """Share of users (by first interaction) or of interactions (by time) that train; the rest is
    halved."""
    cold_items: Literal["text-only", "drop"] = "text-only"
    """Held-out targets that no training row holds: kept, their slots empty; or dropped, and no
    cold item is a candidate."""
    candidates: Literal["uniform", "popularity", "full"] = "uniform"
    """How negatives are drawn: evenly, by their training interactions, or all titles at once."""
    num_candidates: int = 20
    """Size of a candidate set: the target and `num_candidates - 1` negatives."""
    num_draws: int = 1
    """Independent candidate sets per held-out row; metrics are means over them."""
    num_shards: int = 16
    """Groups of users, each prepared by one task and written to one training file."""
    max_rejected_rows: int = 0
    """Broken raw rows tolerated before `prepare` refuses."""
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(1, self, "data", "window", "num_shards", "num_draws", "min_user_events")
        _at_least(0, self, "data", "max_rejected_rows", "seed", "min_item_events", "max_history")
        _require(
            1 <= self.min_history <= self.window,
            f"data.min_history is {self.min_history}; choose 1 to data.window = {self.window}",
        )
        _require(
            not 0 < self.max_history <= self.min_history,
            f"data.max_history is {self.max_history}; a row needs data.min_history ="
            f" {self.min_history} interactions and a target: choose more, or 0 for all",
        )
        _at_least(2, self, "data", "num_candidates")
        _require(
            0 < self.train_share < 1,
            f"data.train_share is {self.train_share}; it must lie between 0 and 1",
        )
        _require(
            self.candidates != "full" or self.num_draws == 1,
            f"data.num_draws is {self.num_draws}, but with data.candidates = full every draw is"
            " the same; choose 1",
        )
        _require(
            self.split == "given" or not self.table.split,
            f"data.table.split is {self.table.split}, but data.split = {self.split} would not use"
            " it; set data.split=given",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedData:
    """A further data set of stage 1."""

    data: DataConfig
    weight: float = 1.0
    """Share of the samples, relative to the target domain's 1."""

    def __post_init__(self) -> None:
        _positive(self, "mixture", "weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommenderConfig:
    """The recommender whose item table fills the slots; by default SASRec's MovieLens preset."""

    model: Literal["gru4rec", "caser", "sasrec"] = "sasrec"
    items: Literal["id", "title"] = "id"
    """A learned vector per item, or its title's frozen vector, projected (MoRec-like)."""
    loss: Literal["softmax", "sampled-softmax", "bce"] = "softmax"
    """Over the whole catalogue; over a sample, corrected; yes or no per item (LLaRA's origin)."""
    num_negatives: int = 100
    """Negatives per row under the two sampled losses."""
    width: int = 64
    """Width of item embeddings and hidden states."""
    num_blocks: int = 1
    """SASRec's blocks, GRU4Rec's layers; Caser has none."""
    num_heads: int = 1
    """SASRec's attention heads."""
    num_filters: int = 16
    """Caser's horizontal filters of each height."""
    dropout: float = 0.0551
    learning_rate: float = 2.41e-3
    weight_decay: float = 0.0184
    """Decoupled L2 (AdamW, arXiv 1711.05101)."""
    batch_size: int = 256
    """Training rows per optimizer step, over all workers."""
    max_epochs: float = 30.0
    patience: int = 3
    """Validations without a better score before training stops."""
    shuffle_history: bool = False
    """Ablation: every history in random order, in training and evaluation."""
    folds: int = 0
    """Cross-fitting: the slots of a training user's rows in stage 2 come from a recommender that
    did not see that user's part of so many; 0 takes one item table for all."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("width", "num_blocks", "num_heads", "num_filters", "num_negatives")
        _at_least(1, self, "recommender", *counts, "batch_size", "patience")
        _at_least(0, self, "recommender", "weight_decay", "seed", "folds")
        _positive(self, "recommender", "learning_rate", "max_epochs")
        _require(
            self.width % self.num_heads == 0,
            f"recommender.width {self.width} is not a multiple of num_heads {self.num_heads}",
        )
        _below_one(self, "recommender", "dropout")
        _require(
            self.folds != 1,
            "recommender.folds is 1, which leaves no user to train on; choose 0, or 2 or more",
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
        _below_one(self, "backbone", "lora_dropout")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """Length limits; the text around the items follows the data's domain."""

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
        _positive(self, "loss", "temperature")
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
        _below_one(self, "stage", "warmup_share")
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
    """Torch threads per CPU worker; 0 takes cores / workers, fewer leave room for more trials."""

    def __post_init__(self) -> None:
        _at_least(0, self, "compute", "workers", "threads")
        known = self.zero_stage in (0, 1, 2, 3)
        _require(known, f"compute.zero_stage is {self.zero_stage}; choose 0, 1, 2 or 3")


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
    mixture: tuple[MixedData, ...] = ()
    """Data sets that stage 1 sees beside `data`, text only."""
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

    def __post_init__(self) -> None:
        _require(
            not self.mixture or (self.stage1.steps > 0 and self.stage1.representation == "text"),
            "mixture needs a stage 1 of text prompts: set stage1.samples, and"
            " stage1.representation to text",
        )
