"""A model card beside every tuned language model, as the Hugging Face hub reads it."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import rsllm
from rsllm.assets.catalogue import ASSETS
from rsllm.config.plain import to_dict
from rsllm.evaluate.metrics import BUCKETS
from rsllm.evaluate.statistics import Estimate, mean_interval
from rsllm.report.page import render
from rsllm.train.batches import HistorySet, TrainingSet
from rsllm.train.checkpoints import State
from rsllm.train.stages import LanguageTask
from rsllm.train.worker import Assignment

CARD = "README.md"
HITS = ("HR@1", "HR@5", "HR@10")
"""Of these a mean over users gives the interval too."""


def write_card(
    folder: Path,
    assignment: Assignment,
    task: LanguageTask,
    state: State,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write README.md: data with hashes and licences, training, validation, use, limits, cost.

    Args:
        folder: with what was tuned; nothing there depends on the card.
        assignment: what was to be done.
        task: what was done.
        state: of its end.
        tensors: what was trained.
    """
    experiment, inputs = assignment.experiment, assignment.inputs
    backbone, end, n = experiment.backbone, state.curve[-1], len(task.validation)
    card = render(
        Path(__file__).with_name("card.md"),
        backbone=backbone.source,
        fingerprint=inputs["backbone"]["source"],
        licence=_licence(backbone.source),
        library="peft" if backbone.tuning == "lora" else "transformers",
        tuning=backbone.tuning,
        version=rsllm.__version__,
        stage=f"stage {task.name[-1]}",
        start=f"artifact {Path(assignment.start).name}" if assignment.start else "the backbone",
        slots=inputs["recommender"] and f"{experiment.recommender.model} ({inputs['recommender']})",
        settings=to_dict(task.stage),
        scorer=task.stage.ranks_by,
        num_candidates=experiment.data.num_candidates,
        data=[_described(part) for part in task.batches.sets],
        validated=_validated(end, n),
        by_target={name: found for name in BUCKETS if (found := _bucket(end, name))},
        cost={
            "seconds": round(state.seconds),
            "tokens": round(end["tokens_per_second"] * end["seconds"]),
            "trained": sum(tensor.numel() for tensor in tensors.values()),
        },
        machine=platform.machine(),
        precision=assignment.layout.precision,
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def _described(part: TrainingSet | HistorySet) -> dict[str, Any]:
    source, raw = part.data.config["source"], part.data.facts["inputs"]["raw"]
    return {
        "name": source if source in ASSETS else Path(source).name,
        "key": part.data.path.name,
        "users": part.num_users,
        "licence": _licence(source),
        "files": {name: digest for files in raw.values() for name, digest in files.items()},
    }


def _licence(source: str) -> str:
    return ASSETS[source].licence if source in ASSETS else "as its owner states"


def _validated(end: Mapping[str, float], n: int) -> dict[str, Any]:
    """Of all users, with intervals."""
    low, high = (end[f"targets/all/MRR_{side}"] for side in ("low", "high"))
    mrr = asdict(Estimate(end["MRR"], low, high, n))
    return {name: _interval(end[name], n) for name in HITS} | {"MRR": mrr}


def _bucket(end: Mapping[str, float], name: str) -> dict[str, Any] | None:
    """Of the users with such a target; no metrics where they are too few, None without any."""
    n, hits = round(end[f"targets/{name}/n"]), end.get(f"targets/{name}/HR@1")
    if not n:
        return None
    hit = None if hits is None else _interval(hits, n)
    return {"n": n, "HR@1": hit, "MRR": end.get(f"targets/{name}/MRR")}


def _interval(share: float, n: int) -> dict[str, Any]:
    """Wilson's, of a share of n users."""
    return asdict(mean_interval(np.arange(n) < round(share * n)))
