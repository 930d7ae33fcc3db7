"""The stages that train, and what the workers of one run are told to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rsllm.compute.layout import Layout
from rsllm.config import Experiment
from rsllm.store.artifacts import Store

Stage = Literal["recommender", "keys", "stage1", "stage2"]


class StageFacts(NamedTuple):
    """Where a stage's artifact and its settings are found."""

    kind: str
    """Of its artifact."""
    section: str
    """The section of an `Experiment` that says how it is trained, its seed included."""
    is_language_model: bool


STAGES: dict[Stage, StageFacts] = {
    "recommender": StageFacts("recommender", "recommender", is_language_model=False),
    "keys": StageFacts("keys", "catalogue", is_language_model=False),
    "stage1": StageFacts("stage-1", "stage1", is_language_model=True),
    "stage2": StageFacts("stage-2", "stage2", is_language_model=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One run of a stage; folders are those of the driver's node."""

    stage: Stage
    experiment: Experiment
    layout: Layout
    store: Store
    inputs: dict[str, Any]
    """What decides the artifact, together with its kind."""
    data: str
    backbone: str = ""
    titles: str = ""
    """Folder of title vectors: they stand for the items of a recommender (empty: ids do), or are a
    part of the catalogue scorer's keys."""
    keys: str = ""
    """Folder of the keys that the catalogue scorer starts from; empty starts at the rule."""
    fold: int | None = None
    """The part of the training users that a cross-fitted recommender does not see."""
    recommender: str = ""
    """Folder of the item table that fills the slots; empty for prompts without slots."""
    mixture: Sequence[tuple[str, float]] = ()
    """Folders and weights of the further data sets of stage 1."""
    start: str = ""
    """Folder of the adapter to continue from; empty starts fresh."""

    @property
    def facts(self) -> StageFacts:
        """Where the stage's artifact and settings are found."""
        return STAGES[self.stage]

    @property
    def name(self) -> str:
        """The name of the run: its artifact's kind and key."""
        return f"{self.facts.kind}-{self.store.path(self.facts.kind, self.inputs).name}"

    @property
    def checkpoints(self) -> str:
        """The location of the run's checkpoints."""
        return self.store.below(f"running/{self.name}")
