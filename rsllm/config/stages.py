"""How the language model is tuned: prompts, losses, stages."""

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rsllm.config.checks import Share, settings
from rsllm.errors import ConfigError

REPRESENTATIONS = {
    "index": ("number",),
    "behavioural": ("slot",),
    "text": ("title",),
    "llara": ("title", "slot"),
    "unified": ("title", "marker", "slot"),
}
"""The parts of an item in a prompt, in their order; a slot holds the item's projected vector.
`llara` is as in arXiv 2312.02445, `unified` is RSLLM's."""
SLOTTED = tuple(name for name, parts in REPRESENTATIONS.items() if "slot" in parts)
if TYPE_CHECKING:  # which does not read the table
    Representation = str
else:
    Representation = Literal[tuple(REPRESENTATIONS)]
Form = Literal["choice", "history"]
Scorer = Literal["likelihood", "written", "pointer", "catalogue"]
"""What a language model ranks by: the log-probability of titles, the title that it writes (HR@1 is
then the paper's HitRatio@1), the pointer at the candidates of a choice prompt, or the catalogue
scorer of a history prompt (the last two are ours)."""
RANKERS = ("recommender", "catalogue", "pointer", "likelihood", "fused")
"""What a trained model can rank by, the cheapest first: its recommender, the language model by one
of its scorers, or both, whose log-probabilities are added."""


@settings
class PromptConfig:
    """How a row is written; the text around the items follows the data's domain."""

    candidate_slots: bool = True
    """Whether candidates have slots as the history does, or stand as titles alone."""
    answer: Literal["title", "letter"] = "title"
    """What is to be answered: the title, or the letter before it (a verbalizer, LlamaRec)."""
    max_title_tokens: PositiveInt = 24
    """Longer titles are cut, and counted."""
    history_items: PositiveInt = 20
    """Most items of a history prompt in training that ask for the next one."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Longest prompt; whole oldest history items are dropped until it fits, and counted."""


@settings
class LossConfig:
    """L = (1 - alpha - beta) L_NIP + alpha L_TT + beta L_UT + gamma L_rank.

    The first three are RSLLM's; L_rank is an extension of ours, and gamma = 0 is the paper. History
    prompts have the first three at every position.
    """

    alpha: NonNegativeFloat = 0.1
    """Weight of the target-to-target contrast; 0 turns it off."""
    beta: NonNegativeFloat = 0.05
    """Weight of the user-to-target contrast; 0 turns it off."""
    temperature: PositiveFloat = 0.1
    """Temperature of the contrasts; history prompts learn theirs, see `catalogue.temperature`."""
    symmetric: bool = False
    """Also contrast each joint vector with the targets of other rows, and take the mean."""
    user_span: Literal["history", "prompt"] = "history"
    """What v^U pools: the history, or the whole prompt, whose candidates name the target."""
    gamma: NonNegativeFloat = 0.0
    """Weight of the ranking loss over the row's candidates (ours)."""
    alignment: NonNegativeFloat = 0.0
    """Weight of a contrast of each target's slot with its own title (ablation, not RSLLM's)."""
    scorer: Literal["likelihood", "pointer"] = "likelihood"
    """What the ranking loss ranks by: title log-probabilities, or the pointer (ours)."""
    negatives: Literal["catalogue", "batch"] = "catalogue"
    """Of history prompts: every item, or the next items of all prompts of a step, corrected for how
    often they come up (logQ)."""

    def __post_init__(self) -> None:
        if self.alpha + self.beta > 1:
            raise ConfigError(
                f"loss.alpha {self.alpha} + loss.beta {self.beta} is more than the weight of all"
                " three losses; keep the sum below 1, or at 1 under history prompts"
            )

    @property
    def contrasts(self) -> bool:
        """Whether any contrastive loss has weight."""
        return any(name.endswith("_contrast") for name in self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """The losses that count, by their names in logs, and how much."""
        weights = {
            "next_item": 1 - (self.alpha + self.beta),
            "target_contrast": self.alpha,
            "user_contrast": self.beta,
            "alignment_contrast": self.alignment,
            "ranking": self.gamma,
        }
        return {name: weight for name, weight in weights.items() if weight}


@settings
class StageConfig:
    """One stage of language-model tuning: which prompts, how long, under which loss."""

    representation: Representation
    """How an item is written, one of `REPRESENTATIONS`."""
    samples: NonNegativeInt
    """Training prompts seen; 0 skips the stage."""
    prompts: Form = "choice"
    """`choice`: a history and candidates, one of which is the next item (the paper's form).
    `history`: items alone, each but the last of which predicts the next one (ours)."""
    batch_size: PositiveInt = 8
    """Training prompts per optimizer step, over all workers and accumulation steps."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step and worker. Contrasts see one micro-batch's negatives,
    unless gradients are cached."""
    gradient_caching: bool = False
    """Contrasts over all micro-batches of a step, at the price of a second forward pass
    (arXiv 2101.06983)."""
    curriculum: bool = False
    """LLaRA's: a step is text-only with a chance that falls from 1 to 0 over the stage."""
    trains: Literal["all", "backbone", "projector"] = "all"
    """What of the language model and the projector learns."""
    lora_learning_rate: PositiveFloat = 5e-4
    projector_learning_rate: PositiveFloat = 5e-3
    catalogue_learning_rate: PositiveFloat = 1e-3
    """Of what brings histories and items into one space, under history prompts."""
    warmup_share: Share = 0.05
    weight_decay: NonNegativeFloat = 0.0
    max_gradient_norm: PositiveFloat = 1.0
    validations: PositiveInt = 1
    """Validations (and reports to the search), evenly spaced; the last is at the end."""
    loss: LossConfig = field(default_factory=LossConfig)
    seed: NonNegativeInt = 0
    """Seeds fresh weights, sample order, templates and training negatives."""

    def __post_init__(self) -> None:
        size, parts = self.batch_size, self.accumulation
        if size % parts:
            raise ConfigError(f"stage.batch_size {size} is not a multiple of accumulation {parts}")
        needs_slots = self.curriculum or self.loss.alignment or self.trains == "projector"
        if needs_slots and self.representation not in SLOTTED:
            raise ConfigError(
                f"stage.representation is {self.representation}, which has no slots for a"
                f" curriculum, alignment or projector; choose one of {', '.join(SLOTTED)}"
            )
        self._check_form()

    def _check_form(self) -> None:
        """Refuse settings that the form of the prompts has no use for."""
        loss = self.loss
        if self.prompts == "choice" and loss.alpha + loss.beta == 1:
            raise ConfigError(
                f"loss.alpha {loss.alpha} + loss.beta {loss.beta} leaves no weight for the"
                " language-model loss of choice prompts; keep the sum below 1"
            )
        unused = {
            "loss.gamma": loss.gamma,
            "loss.alignment": loss.alignment,
            "loss.symmetric": loss.symmetric,
            "gradient_caching": self.gradient_caching,
            "curriculum": self.curriculum,
        }
        for name, value in unused.items():
            if self.prompts == "history" and value:
                raise ConfigError(
                    f"stage.{name} is {value}, which history prompts have no use for: they list no"
                    " candidates; set it to 0 or false, or prompts to choice"
                )

    @property
    def ranks_by(self) -> Scorer:
        """What candidates are ranked by: what was trained for it, else the likelihood."""
        if self.prompts == "history":
            return "catalogue" if self.loss.beta > 0 else "likelihood"
        return self.loss.scorer if self.loss.gamma > 0 else "likelihood"

    @property
    def steps(self) -> int:
        """Optimizer steps: samples / batch_size, rounded down."""
        return self.samples // self.batch_size
