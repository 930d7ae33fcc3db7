"""`Experiment`: everything a run depends on, as frozen dataclasses that refuse bad values.

An experiment is plain data: it round-trips through JSON, has a content hash, and variants of it
are written as paths: ``replace_in(base, {"stage2.loss.alpha": 0.1})``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Literal

from rsllm.config.checks import at_least, positive, require
from rsllm.config.data import DataConfig as DataConfig
from rsllm.config.data import Domain as Domain
from rsllm.config.data import MixedData as MixedData
from rsllm.config.data import TableConfig as TableConfig
from rsllm.config.data import TimeUnit as TimeUnit
from rsllm.config.models import BackboneConfig as BackboneConfig
from rsllm.config.models import ProjectorConfig as ProjectorConfig
from rsllm.config.models import RecommenderConfig as RecommenderConfig
from rsllm.config.stages import SLOTTED as SLOTTED
from rsllm.config.stages import LossConfig as LossConfig
from rsllm.config.stages import PromptConfig as PromptConfig
from rsllm.config.stages import Representation as Representation
from rsllm.config.stages import Scorer as Scorer
from rsllm.config.stages import StageConfig as StageConfig

Decoding = Literal["free", "constrained"]
Offload = Literal["none", "optimizer", "parameters"]
Placement = Literal["pack", "spread"]
Precision = Literal["auto", "fp32", "bf16"]


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
    offload: Offload = "none"
    """What ZeRO keeps in CPU memory; `parameters` takes the optimizer along."""
    placement: Placement = "pack"
    """Workers on as few nodes as they fit on, or each on a node of its own."""
    checkpoint_seconds: float = 60.0
    """Work that a killed run may lose; longer where a checkpoint would cost more than 5 %."""
    timeout_seconds: float = 600.0
    """How long a worker waits for the others before it counts as hung."""
    wait_seconds: float = 600.0
    """How long a run waits for room in the cluster, at its start and after a node was lost."""
    max_failures: int = 3
    """Restarts after lost workers; each goes on from the last checkpoint."""

    def __post_init__(self) -> None:
        at_least(0, self, "compute", "workers", "threads", "checkpoint_seconds", "max_failures")
        positive(self, "compute", "timeout_seconds", "wait_seconds")
        known = self.zero_stage in (0, 1, 2, 3)
        require(known, f"compute.zero_stage is {self.zero_stage}; choose 0, 1, 2 or 3")
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        require(
            self.zero_stage >= needed,
            f"compute.offload is {self.offload}, which needs compute.zero_stage {needed} or more;"
            f" it is {self.zero_stage}",
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
    decoding: tuple[Decoding, ...] = ("free",)
    """Any answer, or only titles of the row's candidates."""
    candidate_orders: int = 0
    """Random orders of the candidates in which test rows are ranked again, for order bias."""
    max_new_tokens: int = 64
    """Token limit of a generated answer (LLaRA uses 64)."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        at_least(0, self, "evaluation", "validation_rows", "test_rows", "candidate_orders")
        at_least(-1, self, "evaluation", "generation_rows")
        at_least(1, self, "evaluation", "max_new_tokens", "batch_size")


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
        require(
            not self.mixture or (self.stage1.steps > 0 and self.stage1.representation == "text"),
            "mixture needs a stage 1 of text prompts: set stage1.samples, and"
            " stage1.representation to text",
        )
        for name in ("stage1", "stage2"):
            require(
                not (getattr(self, name).gradient_caching and self.backbone.lora_dropout),
                f"{name}.gradient_caching runs the network twice and must find it the same, but"
                f" backbone.lora_dropout is {self.backbone.lora_dropout}; set one of them to 0",
            )
        self._check_letters()

    def _check_letters(self) -> None:
        if self.prompt.answer != "letter":
            return
        require(
            self.data.num_candidates <= len(ascii_uppercase),
            f"data.num_candidates is {self.data.num_candidates}, and prompt.answer = letter has 26"
            " letters; lower it, or choose prompt.answer = title",
        )
        for name in ("stage1", "stage2"):
            stage: StageConfig = getattr(self, name)
            require(
                not (stage.steps and (stage.loss.alpha or stage.loss.alignment)),
                f"{name}.loss.alpha is {stage.loss.alpha} and its alignment {stage.loss.alignment},"
                " but with prompt.answer = letter no title is answered whose tokens they could"
                " contrast; set it to 0",
            )
