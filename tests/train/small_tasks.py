"""The three stages at the smallest scale that still has dropout, accumulation and contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from small_data import NUM_CANDIDATES, TITLES, WINDOW

from rsllm.config import Experiment
from rsllm.data.prepared import PreparedData
from rsllm.model import tuned
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.settings import replace_in
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
    lora_dropout: float = 0.2,
    tuning: str = "lora",
    **overrides: Any,
) -> LanguageTask:
    """Stage 1, or stage 2 on made-up item vectors, cross-fitted if there are folds."""
    settings = {f"{name}.{setting}": value for setting, value in overrides.items()}
    backbone_settings = {"backbone.lora_dropout": lora_dropout, "backbone.tuning": tuning}
    experiment = replace_in(SMALL, settings | backbone_settings)
    generator = torch.Generator().manual_seed(0)
    vectors_IE, *others = (
        torch.randn(len(TITLES), 8, generator=generator) for _ in range(1 + folds)
    )
    items = ItemEmbeddings(vectors_IE, source="made up", fold_tables=tuple(others))
    stage = getattr(experiment, name)
    model = tuned.build(
        experiment,
        stage.representation,
        backbone,
        data,
        items,
        dtype=torch.float32,
        seed=stage.seed,
    )
    return LanguageTask(experiment, stage, data, model, name=name, autocast=False, mixture=mixture)
