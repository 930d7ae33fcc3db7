"""Settings of the recommenders that a search chose, and the result that shows it."""

import tomllib
from pathlib import Path
from typing import Any

from rsllm.errors import ConfigError

PRESETS = Path(__file__).with_name("presets.toml")
USUAL = "movielens-100k"
HISTORIES: dict[str, Any] = {
    "stage1.samples": 0,
    "stage2.prompts": "history",
    "stage2.loss.alpha": 0.1,
    "stage2.loss.beta": 0.8,
    "stage2.batch_size": 16,
    "stage2.projector_learning_rate": 2e-3,
    "stage2.catalogue_learning_rate": 3e-4,
    "projector.bounded": True,
    "backbone.layers": 12,
    "evaluation.batch_size": 32,
    "evaluation.generation_rows": -1,
}
"""How a language model learns from every position of a history, as paths into `Experiment`."""


def preset(model: str, source: str) -> dict[str, Any]:
    """The tuned settings of a recommender, as paths into `Experiment`.

    Args:
        model: gru4rec, caser or sasrec.
        source: name of the data; those tuned on MovieLens-100K stand in where there are none.

    Raises:
        ConfigError: no such recommender.
    """
    tuned = tomllib.loads(PRESETS.read_text())
    by_source = {name: by_model[model] for name, by_model in tuned.items() if model in by_model}
    if not by_source:
        raise ConfigError(f"recommender {model!r} is unknown; choose gru4rec, caser or sasrec")
    chosen = by_source.get(source, by_source[USUAL])
    return {f"recommender.{name}": value for name, value in chosen.items() if name != "result"} | {
        "recommender.model": model
    }
