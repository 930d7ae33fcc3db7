"""Traditional sequential recommenders, whose item embeddings fill the slots of the prompts."""

from __future__ import annotations

from rsllm.config import RecommenderConfig
from rsllm.errors import ConfigError
from rsllm.recommenders.base import Recommender
from rsllm.recommenders.sasrec import SASRec

MODELS: dict[str, type[Recommender]] = {"sasrec": SASRec}


def build(config: RecommenderConfig, num_items: int, window: int) -> Recommender:
    """A freshly initialised recommender; `torch.manual_seed` decides its weights.

    Raises:
        ConfigError: `config.model` names no recommender.
    """
    if config.model not in MODELS:
        raise ConfigError(f"recommender.model is {config.model!r}; choose one of {sorted(MODELS)}")
    return MODELS[config.model](num_items, config, window)
