"""A model card beside every tuned language model, as the Hugging Face hub reads it."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData

import rsllm
from rsllm.assets.catalogue import ASSETS, hub_name
from rsllm.config import REPRESENTATIONS, Experiment
from rsllm.config.plain import to_dict
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.groups import GROUPS
from rsllm.evaluate.metrics import METRICS
from rsllm.evaluate.statistics import Estimate, mean_interval
from rsllm.report.templates import render

CARD = "README.md"
LOADING = "## How to load it"
"""The last heading of a card."""


def write_card(
    folder: Path,
    *,
    name: str,
    experiment: Experiment,
    stage: str,
    inputs: Mapping[str, Any],
    start: str,
    data: Sequence[tuple[PreparedData, int]],
    validation: Mapping[str, float],
    num_validated: int,
    num_trained: int,
    seconds: float,
    precision: str,
) -> None:
    """Write README.md: data with hashes and licences, training, validation, use, limits, cost.

    Args:
        folder: of the tuned model; nothing in it depends on the card.
        name: the tuned model's, KIND/KEY.
        experiment: the run's settings.
        stage: the section of it that was trained, such as stage2.
        inputs: what decides the artifact.
        start: from what training started.
        data: each data set with the number of its training users.
        validation: the last entry of the learning curve.
        num_validated: users of the validation.
        num_trained: numbers that were trained.
        seconds: of training.
        precision: of training.
    """
    backbone, settings = experiment.backbone, getattr(experiment, stage)
    source, named = backbone.source, {*ASSETS, hub_name(backbone.source)}
    tokens = validation["tokens_per_second"] * validation["seconds"]
    low, high = (validation[f"targets/all/MRR_{side}"] for side in ("low", "high"))
    mrr = asdict(Estimate(validation["MRR"], low, high, num_validated))
    hits = {n: _interval(validation[n], num_validated) for n, m in METRICS.items() if m.share}
    text = render(
        "card.md",
        backbone=source if source in named else Path(source).name,
        fingerprint=inputs["backbone"]["source"],
        licence=_licence(source),
        tuning=backbone.tuning,
        version=rsllm.__version__,
        stage=f"stage {stage[-1]}",
        start=start,
        slots=inputs["recommender"] and f"{experiment.recommender.model} ({inputs['recommender']})",
        parts=REPRESENTATIONS[settings.representation],
        settings=to_dict(settings),
        scorer=settings.ranks_by,
        num_candidates=experiment.data.num_candidates,
        candidates=experiment.data.candidates,
        data=[_described(part, num_users) for part, num_users in data],
        validated=hits | {"MRR": mrr},
        by_target={name: group for name in GROUPS if (group := _group(validation, name))},
        cost={"seconds": round(seconds), "tokens": round(tokens), "trained": num_trained},
        machine=platform.machine(),
        precision=precision,
    )
    # The hub refuses a backbone or a data set that has no name of its kind.
    facts = ModelCardData(
        base_model=hub_name(source) or None,
        library_name="peft" if backbone.tuning == "lora" else "transformers",
        license="other",
        license_name="of-backbone-and-data",
        tags=["rsllm", "sequential-recommendation", backbone.tuning],
        datasets=[p.config["source"] for p, _ in data if p.config["source"] in ASSETS] or None,
    )
    save_card(folder, facts, text, loading(name))


def save_card(folder: Path, facts: ModelCardData, text: str, last: str) -> None:
    """Write README.md: facts that the hub reads, above a text for people and its last section."""
    card = f"---\n{facts.to_yaml()}\n---\n\n{text.strip()}\n\n{last}\n"
    (folder / CARD).write_text(card, encoding="utf-8")


def loading(
    place: str, library: str = "", backbone: str = "", *, layers: int = 0, prepare: str = ""
) -> str:
    """The last section of a card: how a model is loaded.

    Args:
        place: by which rsllm knows it: KIND/KEY, its folder or its name on the hub.
        library: peft or transformers, which read it too; empty leaves them out.
        backbone: what an adapter stands on.
        layers: of the backbone that are kept; 0 keeps all.
        prepare: the command that prepares its data, which did not travel; empty if they did.
    """
    context = {"place": place, "library": library, "backbone": backbone, "layers": layers}
    context |= {"prepare": prepare, "fetched": backbone in ASSETS}
    return render("loading.md", **context)


def _described(data: PreparedData, num_users: int) -> dict[str, Any]:
    source, raw = data.config["source"], data.facts["inputs"]["raw"]
    return {
        "name": source if source in ASSETS else Path(source).name,
        "key": data.path.name,
        "users": num_users,
        "licence": _licence(source),
        "files": {name: digest for files in raw.values() for name, digest in files.items()},
    }


def _licence(source: str) -> str:
    return ASSETS[source].licence if source in ASSETS else "as its owner states"


def _group(validation: Mapping[str, float], name: str) -> dict[str, Any] | None:
    """Return the metrics of users with such a target: None if there are none, and no values if
    they are too few."""
    n = round(validation.get(f"targets/{name}/n", 0))
    hits = validation.get(f"targets/{name}/HR@1")
    if not n:
        return None
    hit = None if hits is None else _interval(hits, n)
    return {"n": n, "HR@1": hit, "MRR": validation.get(f"targets/{name}/MRR")}


def _interval(share: float, n: int) -> dict[str, Any]:
    """Return Wilson's interval of a share of n users."""
    return asdict(mean_interval(np.arange(n) < round(share * n)))
