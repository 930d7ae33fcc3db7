"""Traditional sequential recommenders, whose item embeddings fill the slots of the prompts."""

from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsllm.config import RecommenderConfig
from rsllm.config.models import RECOMMENDERS
from rsllm.errors import CheckpointError
from rsllm.recommenders.base import Recommender, TitleItems

FILE = "recommender.safetensors"
SEEN = "seen.json"
"""Metrics on training rows, scored like held-out ones: how much surer their slots are."""


def build(
    config: RecommenderConfig, num_items: int, window: int, titles_ID: Tensor | None = None
) -> Recommender:
    """A freshly initialised recommender; `torch.manual_seed` decides its weights.

    Args:
        config: which, and how large.
        num_items: size of the catalogue; item ids are 0 to `num_items` - 1.
        window: longest history, in items.
        titles_ID: frozen title vectors, which then stand for the items.
    """
    width = config.width
    items = nn.Embedding(num_items, width) if titles_ID is None else TitleItems(titles_ID, width)
    module, _, name = RECOMMENDERS[config.model].partition(":")
    recommender: Recommender = getattr(import_module(module), name)(items, config, window)
    return recommender


def save(model: Recommender, folder: Path) -> None:
    """Write the weights; projected titles as the item table that they project to."""
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("items.")}
    table_IE = model.item_table.detach().float().cpu().contiguous()
    save_file({**weights, "items.weight": table_IE}, folder / FILE)


def load(folder: Path, config: RecommenderConfig, num_items: int, window: int) -> Recommender:
    """Read what `save` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or of a recommender of another shape.
    """
    model = build(config, num_items, window)
    try:
        model.load_state_dict(load_file(folder / FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot read a {config.model} from {folder} ({error}); fit the recommender again"
        ) from error
    return model.eval()
