"""`Experiment`: everything a run depends on, as frozen dataclasses that refuse bad values.

An experiment is plain data: it round-trips through JSON, has a content hash, and variants of it
are written as paths: ``replace_in(base, {"stage2.loss.alpha": 0.1})``.
"""

from dataclasses import field, replace
from string import ascii_uppercase
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rsllm.config.checks import settings
from rsllm.config.data import AUTO, DataConfig, Domain, MixedData, TableConfig
from rsllm.config.models import (
    BackboneConfig,
    CatalogueConfig,
    ProjectorConfig,
    RecommenderConfig,
)
from rsllm.config.stages import (
    REPRESENTATIONS,
    SLOTTED,
    Form,
    LossConfig,
    PromptConfig,
    Representation,
    Scorer,
    StageConfig,
)
from rsllm.errors import ConfigError

Decoding = Literal["free", "constrained", "catalogue"]
Offload = Literal["none", "optimizer", "parameters"]
Placement = Literal["pack", "spread"]
Precision = Literal["auto", "fp32", "bf16"]


@settings
class ComputeConfig:
    """How training is laid out; `rsllm.compute.layout` resolves 0 and `auto` from the machine."""

    workers: NonNegativeInt = 0
    """Data-parallel workers of one training run; 0 takes one (per GPU group)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    precision: Precision = "auto"
    """`bf16`: autocast on CPUs, bf16 engine on GPUs. `auto`: bf16 where the hardware has it."""
    threads: NonNegativeInt = 0
    """Torch threads per CPU worker; 0 takes cores / workers, fewer leave room for more trials."""
    offload: Offload = "none"
    """What ZeRO keeps in CPU memory; `parameters` takes the optimizer along."""
    placement: Placement = "pack"
    """Workers on as few nodes as they fit on, or each on a node of its own."""
    checkpoint_seconds: NonNegativeFloat = 60.0
    """Work that a killed run may lose; longer where a checkpoint would cost more than 5 %."""
    timeout_seconds: PositiveFloat = 600.0
    """How long a worker waits for the others before it counts as hung."""
    wait_seconds: PositiveFloat = 600.0
    """How long a run waits for room in the cluster, at its start and after a node was lost."""
    max_failures: NonNegativeInt = 3
    """Restarts after lost workers; each goes on from the last checkpoint."""

    def __post_init__(self) -> None:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ConfigError(
                f"compute.offload is {self.offload}, which needs compute.zero_stage {needed} or"
                f" more; it is {self.zero_stage}"
            )


@settings
class EvaluationConfig:
    """How many held-out rows are scored, and how answers are decoded."""

    validation_rows: NonNegativeInt = 0
    """Rows scored at each validation; 0 takes all."""
    test_rows: NonNegativeInt = 0
    """Test rows ranked; 0 takes all."""
    generation_rows: Annotated[int, Field(ge=-1)] = 0
    """Test rows answered by greedy generation too; 0 takes all, -1 none."""
    decoding: tuple[Decoding, ...] = ("free",)
    """Any answer, only titles of the row's candidates, or only those titles of the catalogue that
    are not in the history (generative retrieval). The scorer `written` takes the first of these."""
    candidate_orders: NonNegativeInt = 0
    """Random orders of the candidates in which test rows are ranked again, for order bias."""
    shuffle_history: bool = False
    """Ablation: every history in random order, in evaluation alone."""
    max_new_tokens: PositiveInt = 64
    """Token limit of a generated answer (LLaRA uses 64)."""
    batch_size: PositiveInt = 8


@settings
class Experiment:
    """One run of the pipeline: data, recommender, backbone, two stages, evaluation."""

    data: DataConfig = field(default_factory=DataConfig)
    mixture: tuple[MixedData, ...] = ()
    """Data sets that stage 1 sees beside `data`, text only."""
    recommender: RecommenderConfig = field(default_factory=RecommenderConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    catalogue: CatalogueConfig = field(default_factory=CatalogueConfig)
    stage1: StageConfig = field(
        default_factory=lambda: StageConfig(representation="text", samples=4096)
    )
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(representation="unified", samples=8192)
    )
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def anywhere(self) -> "Experiment":
        """The same experiment with the default `compute`, which decides no name of a search."""
        return replace(self, compute=ComputeConfig())

    def __post_init__(self) -> None:
        if self.mixture and not (self.stage1.steps and self.stage1.representation == "text"):
            raise ConfigError("mixture needs stage1.samples and stage1.representation = text")
        contrasts = self.stage1.loss.alpha + self.stage1.loss.beta
        if self.mixture and self.stage1.prompts == "history" and contrasts:
            raise ConfigError(
                f"stage1.loss.alpha + stage1.loss.beta is {contrasts}, but under history prompts"
                " they tell an item from those of data alone, and mixture has others; set both to"
                " 0, or stage1.prompts to choice"
            )
        letters, dropout = self.prompt.answer == "letter", self.backbone.lora_dropout
        if letters and self.data.num_candidates > len(ascii_uppercase):
            raise ConfigError(
                f"data.num_candidates is {self.data.num_candidates}, and prompt.answer = letter has"
                " 26 letters; lower it, or choose prompt.answer = title"
            )
        if letters and "catalogue" in self.evaluation.decoding:
            raise ConfigError(
                "evaluation.decoding has catalogue, but with prompt.answer = letter only candidates"
                " have an answer; leave it out, or choose prompt.answer = title"
            )
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if stage.gradient_caching and dropout:
                raise ConfigError(
                    f"{name}.gradient_caching runs the network twice and must find it the same, but"
                    f" backbone.lora_dropout is {dropout}; set one of them to 0"
                )
            if letters and stage.steps and stage.prompts == "history":
                raise ConfigError(
                    f"prompt.answer is letter, but {name}.prompts = history lists no candidates"
                    " that could have one; choose prompt.answer = title"
                )
            if letters and stage.steps and (stage.loss.alpha or stage.loss.alignment):
                raise ConfigError(
                    f"{name}.loss.alpha is {stage.loss.alpha} and its alignment"
                    f" {stage.loss.alignment}, but with prompt.answer = letter there are no tokens"
                    " of a title that they could contrast; set it to 0"
                )
