"""The three stages at the smallest scale that still has dropout, accumulation and contrasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from small_data import NUM_CANDIDATES, TITLES, WINDOW
from torch import Tensor

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.model import tuned
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.train.keys import KeysTask
from rsllm.train.recommender import RecommenderTask
from rsllm.train.stages import LanguageTask

SMALL = replace_in(
    Experiment(),
    {
        "data.window": WINDOW,
        "data.num_candidates": NUM_CANDIDATES,
        "recommender.width": 8,
        "recommender.batch_size": 20,
        "recommender.max_epochs": 3,
        "backbone.lora_rank": 2,
        "backbone.lora_dropout": 0.2,
        "prompt.max_title_tokens": 8,
        "prompt.history_items": 4,
        "catalogue.batch_size": 4,
        "catalogue.max_epochs": 3.0,
        "projector.hidden": 8,
        "stage1.samples": 48,
        "stage1.batch_size": 4,
        "stage2.samples": 24,
        "stage2.batch_size": 4,
        "stage2.validations": 3,
        "stage2.loss.gamma": 0.5,
    },
)


def recommender_task(data: PreparedData, **overrides: Any) -> RecommenderTask:
    settings = {f"recommender.{name}": value for name, value in overrides.items()}
    return RecommenderTask(replace_in(SMALL, settings), data)


def language_task(
    data: PreparedData,
    backbone: Path,
    *,
    name: str = "stage2",
    mixture: Sequence[tuple[PreparedData, float]] = (),
    folds: int = 0,
    title_width: int = 6,
    lora_dropout: float = 0.2,
    tuning: str = "lora",
    whole: Mapping[str, Any] = MappingProxyType({}),
    **overrides: Any,
) -> LanguageTask:
    """Stage 1, or stage 2 on made-up item vectors, cross-fitted if there are folds.

    Args:
        whole: settings of the experiment; `overrides` are those of the stage.
    """
    settings = {f"{name}.{setting}": value for setting, value in overrides.items()}
    backbone_settings = {"backbone.lora_dropout": lora_dropout, "backbone.tuning": tuning}
    experiment = replace_in(SMALL, settings | backbone_settings | whole)
    stage, items = getattr(experiment, name), made_up_items(folds)
    history = stage.prompts == "history"
    model = tuned.build(
        experiment,
        stage.representation,
        backbone,
        data,
        items,
        dtype=torch.float32,
        form=stage.prompts,
        titles_IF=made_up_titles(title_width) if history else None,
        seed=stage.seed,
    )
    return LanguageTask(experiment, stage, data, model, name=name, autocast=False, mixture=mixture)


def history_task(data: PreparedData, backbone: Path, **overrides: Any) -> LanguageTask:
    """A stage on history prompts, with all three losses."""
    losses = {"loss.alpha": 0.2, "loss.beta": 0.3, "loss.gamma": 0.0}
    return language_task(data, backbone, **{"prompts": "history", **losses, **overrides})


def keys_task(
    data: PreparedData, *, items: bool = True, folds: int = 0, **overrides: Any
) -> KeysTask:
    """Keys of made-up titles and, if there are items, of made-up vectors."""
    settings = {f"catalogue.{name}": value for name, value in overrides.items()}
    vectors = made_up_items(folds) if items else None
    return KeysTask(replace_in(SMALL, settings), data, vectors, made_up_titles(6))


def made_up_items(folds: int = 0) -> ItemEmbeddings:
    generator = torch.Generator().manual_seed(0)
    vectors_IE, *others = (
        torch.randn(len(TITLES), 8, generator=generator) for _ in range(1 + folds)
    )
    return ItemEmbeddings(vectors_IE, source="made up", fold_tables=tuple(others))


def made_up_titles(width: int) -> Tensor:
    return torch.randn(len(TITLES), width, generator=torch.Generator().manual_seed(1))
