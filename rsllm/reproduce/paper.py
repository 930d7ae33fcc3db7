"""The paper's data sets, and what may be spent on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsllm.config import Experiment
from rsllm.settings import replace_in
from rsllm.tune.arguments import Budget

GIVEN = {"data.split": "given"}
SOURCES: dict[str, dict[str, Any]] = {
    "movielens-100k": {},
    "llara-lastfm": GIVEN,
    "llara-steam-sample": GIVEN,
}
DATA: dict[str, dict[str, Any]] = {
    **{name: {"data.source": name, **settings} for name, settings in SOURCES.items()},
    **{
        f"{name}, all users": {"data.source": name, "data.split": "leave-one-out"}
        for name in ("movielens-100k", "llara-lastfm")
    },
}
"""The published splits, and for power the last item of every user: MovieLens' 943, and of LLaRA's
LastFM the 976 sequences put together again and the 244 windows held out."""
LABELS = {"llara-lastfm": "order artefact", "llara-steam-sample": "a sample of the training rows"}
"""LLaRA's LastFM stands in one global order of items: scores say nothing about sequences there."""
BASE = replace_in(Experiment(), {"stage2.validations": 4})
RANKED = {"stage2.loss.gamma": 3.0, "stage2.loss.scorer": "pointer"}
"""Our ranking loss; without it gamma is 0, as published."""
NO_CONTRASTS = {"stage2.loss.alpha": 0.0, "stage2.loss.beta": 0.0}

BUDGETS = {
    "quick": Budget(
        summary="128 samples, estimated 4 min a tuned method on 2 cores: shows the flow",
        seeds=1,
        overrides={
            "recommender.max_epochs": 3.0,
            "stage1.samples": 32,
            "stage2.samples": 96,
            "stage2.validations": 2,
            "evaluation.validation_rows": 48,
            "evaluation.test_rows": 95,
            "evaluation.generation_rows": 24,
            "evaluation.max_new_tokens": 24,
        },
    ),
    "tiny": Budget(
        summary="seconds a method with a tiny language model: for tests",
        seeds=1,
        overrides={
            "data.window": 5,
            "data.num_candidates": 8,
            "recommender.max_epochs": 1.0,
            "stage1.samples": 8,
            "stage2.samples": 16,
            "stage2.validations": 1,
            "evaluation.validation_rows": 8,
            "evaluation.test_rows": 12,
            "evaluation.generation_rows": 4,
            "evaluation.max_new_tokens": 4,
        },
    ),
    "hour": Budget(
        summary="1,024 samples, 300 users: about 26 min a tuned method and seed on 2 cores",
        seeds=1,
        overrides={
            "stage1.samples": 64,
            "stage2.samples": 960,
            "stage2.validations": 2,
            "evaluation.validation_rows": 96,
            "evaluation.test_rows": 300,
            "evaluation.generation_rows": 48,
            "evaluation.max_new_tokens": 24,
        },
    ),
    "full": Budget(
        summary="for GPUs, not yet measured: every held-out row, a long schedule, three seeds",
        seeds=3,
        overrides={
            "stage1.samples": 8192,
            "stage1.batch_size": 32,
            "stage2.samples": 49152,
            "stage2.batch_size": 64,
        },
    ),
}
USUAL: Mapping[str, tuple[str, ...]] = dict.fromkeys(("quick", "tiny", "hour"), ("movielens-100k",))
"""By budget, the data sets without --data; all of them where nothing is said."""
