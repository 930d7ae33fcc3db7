"""The parts that are trained: recommender, language model, projector."""

from importlib.metadata import entry_points
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rsllm.config.checks import Share, settings
from rsllm.errors import ConfigError

RECOMMENDERS = {
    "gru4rec": "rsllm.recommenders.gru4rec:GRU4Rec",
    "caser": "rsllm.recommenders.caser:Caser",
    "sasrec": "rsllm.recommenders.sasrec:SASRec",
    "esasrec": "rsllm.recommenders.esasrec:eSASRec",
}
"""Every recommender's module and class. One of yours comes from a line here, or from an installed
package with an entry point of the group `rsllm.recommenders`, which all nodes find."""
RECOMMENDERS |= {point.name: point.value for point in entry_points(group="rsllm.recommenders")}


def recommender_titles() -> dict[str, str]:
    """Return every recommender by the name that tables show, its class's."""
    return {path.partition(":")[2]: model for model, path in RECOMMENDERS.items()}


@settings
class RecommenderConfig:
    """The recommender whose item table fills the slots; by default SASRec's MovieLens preset."""

    model: str = "sasrec"
    """One of `RECOMMENDERS`."""
    items: Literal["id", "title"] = "id"
    """A learned vector per item, or its title's frozen vector, projected (MoRec-like)."""
    loss: Literal["softmax", "sampled-softmax", "bce"] = "softmax"
    """Over the whole catalogue; over a sample, corrected; yes or no per item (LLaRA's origin)."""
    num_negatives: PositiveInt = 100
    """Negatives per row under the two sampled losses."""
    width: PositiveInt = 64
    """Width of item embeddings and hidden states."""
    num_blocks: PositiveInt = 1
    """Blocks of SASRec and eSASRec, GRU4Rec's layers; Caser has none."""
    num_heads: PositiveInt = 1
    """Attention heads of SASRec and eSASRec."""
    num_filters: PositiveInt = 16
    """Caser's horizontal filters of each height."""
    dropout: Share = 0.0551
    learning_rate: PositiveFloat = 2.41e-3
    weight_decay: NonNegativeFloat = 0.0184
    """Decoupled L2 (AdamW, arXiv 1711.05101)."""
    batch_size: PositiveInt = 256
    """Training rows per optimizer step, over all workers."""
    max_epochs: PositiveFloat = 30.0
    patience: PositiveInt = 3
    """Validations without a better score before training stops."""
    shuffle_history: bool = False
    """Ablation: every history in random order, in training and evaluation."""
    folds: NonNegativeInt = 0
    """Cross-fitting: the slots of a training user's rows in stage 2 come from a recommender that
    did not see that user's part of so many; 0 takes one item table for all."""
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.model not in RECOMMENDERS:
            raise ConfigError(
                f"recommender.model is {self.model!r}; choose one of {', '.join(RECOMMENDERS)}"
            )
        width, heads = self.width, self.num_heads
        if width % heads:
            raise ConfigError(f"recommender.width {width} is not a multiple of num_heads {heads}")
        if self.folds == 1:
            raise ConfigError(
                "recommender.folds is 1, with no user to train on; choose 0, or 2 or more"
            )


@settings
class BackboneConfig:
    """The language model and what of it is tuned."""

    source: str = "smollm2-135m-q4"
    """An asset name (see `rsllm fetch`), a local model folder, or a hub name."""
    layers: NonNegativeInt = 0
    """How many of its layers are kept, from the lowest one; 0 keeps all. Few suffice to read a
    history (SLMRec, arXiv 2405.17890), but what is left does not write titles any more."""
    tuning: Literal["lora", "full"] = "lora"
    """An adapter (arXiv 2106.09685), or every weight."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: Share = 0.0
    lora_targets: tuple[str, ...] = ()
    """Names of the adapted linear layers; empty takes every linear layer of the blocks."""


@settings
class ProjectorConfig:
    """From recommender width to the language model's input width."""

    hidden: PositiveInt = 256
    """Width of the hidden layers of the MLP beside the linear map."""
    depth: NonNegativeInt = 1
    """Hidden layers of the MLP; 0 leaves the linear map alone."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    norm: Literal["none", "layer", "rms"] = "none"
    """Normalisation of each hidden layer, before its activation."""
    scale: PositiveFloat = 1.0
    """Length of slot vectors at the start, relative to token vectors."""
    bounded: bool = False
    """Whether slot vectors are brought to that length, times a learned number, whatever the linear
    map grows to: a step of its weights is then small beside them."""
    start: Literal["random", "titles"] = "random"
    """The linear map's start: at random, or the ridge regression of the items' mean title
    embeddings on their vectors."""
    shuffle_items: bool = False
    """Ablation: every slot holds another item's vector, always the same one."""


@settings
class CatalogueConfig:
    """The catalogue scorer, which ranks all items by a history prompt (ours)."""

    title_width: PositiveInt = 256
    """Width of the title vectors in an item's key."""
    user_state: Literal["last", "mean"] = "last"
    """What of the history the user's vector is made of: the state at its last item, or the mean
    over it (CALRec, arXiv 2405.02429)."""
    shortcut: bool = True
    """Whether the user's vector also holds the keys of the history's items, so that training
    starts at a rule that works and not at chance."""
    recency: Annotated[float, Field(gt=0, le=1)] = 0.7
    """In the shortcut, what an item counts as a multiple of the next one."""
    temperature: PositiveFloat = 0.1
    """Of the cosines, at the start; it is learned."""
    max_epochs: NonNegativeFloat = 10.0
    """Of the keys alone, before a language model reads anything; 0 starts at the rule."""
    learning_rate: PositiveFloat = 1e-3
    """Of the keys alone."""
    batch_size: PositiveInt = 64
    """Windows per step of the keys alone."""
    patience: PositiveInt = 3
    """Validations of the keys alone without a better score before they are done."""
    seed: NonNegativeInt = 0
