"""Settings of the recommenders that a search chose, and the result that shows it."""

import tomllib
from pathlib import Path
from typing import Any

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
    """Return the tuned settings of a recommender, as paths into `Experiment`.

    Where none are on file for the data, those for MovieLens-100K stand in, or else the defaults.
    """
    tuned = tomllib.loads(PRESETS.read_text())
    by_source = {name: models[model] for name, models in tuned.items() if model in models}
    chosen = by_source.get(source, by_source.get(USUAL, {}))
    values = {f"recommender.{name}": value for name, value in chosen.items() if name != "result"}
    return {**values, "recommender.model": model}
