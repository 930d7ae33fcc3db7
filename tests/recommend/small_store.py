"""A store with a recommender and tuned models, made without Ray or training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model.small_models import stir
from small_data import NUM_CANDIDATES, TITLES, WINDOW, small_data

from rsllm import recommenders
from rsllm.assets.catalogue import fingerprint
from rsllm.config import Experiment, Form
from rsllm.config.plain import content_hash, replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.model import tuned
from rsllm.prompts.templates import wording
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.recommenders.ngrams import title_vectors
from rsllm.store.artifacts import Store

SETTINGS: dict[str, Any] = {
    "data.window": WINDOW,
    "data.num_candidates": NUM_CANDIDATES,
    "recommender.width": 8,
    "backbone.lora_rank": 2,
    "projector.hidden": 8,
    "catalogue.title_width": 6,
}


def make_store(folder: Path, backbone: Path) -> tuple[Store, dict[str, str]]:
    """The store, and its artifacts by their names: recommender, history, choice."""
    store = Store.open(folder)
    data = small_data(store.root / "data" / content_hash("small"))
    experiment = replace_in(Experiment(), SETTINGS | {"backbone.source": str(backbone)})
    recommender = _recommender(store, data, experiment)
    made = {"recommender": store.name(recommender)}
    for form in ("history", "choice"):
        made[form] = store.name(_tuned(store, data, experiment, recommender, form))
    return store, made


def _recommender(store: Store, data: PreparedData, experiment: Experiment) -> Path:
    config = experiment.recommender

    def make(staging: Path) -> None:
        torch.manual_seed(0)
        model = recommenders.build(config, len(TITLES), WINDOW)
        stir(model, 0.3)
        recommenders.save(model, staging)
        ItemEmbeddings(model.item_table.detach().float(), "made up").save(staging)

    inputs = {"data": data.path.name, "recommender": to_dict(config), "titles": None}
    return store.get("recommender", inputs, make)


def _tuned(
    store: Store, data: PreparedData, experiment: Experiment, recommender: Path, form: Form
) -> Path:
    history = form == "history"
    ranking = {} if history else {"stage2.loss.gamma": 1.0, "stage2.loss.scorer": "pointer"}
    stage = replace_in(experiment, {"stage2.prompts": form, **ranking}).stage2

    def make(staging: Path) -> None:
        model = tuned.build(
            experiment,
            stage.representation,
            experiment.backbone.source,
            data,
            ItemEmbeddings.load(recommender),
            dtype=torch.float32,
            form=form,
            titles_IF=title_vectors(data.titles, 6) if history else None,
        )
        stir(model.hybrid, 0.05)
        weights = {n: p.detach() for n, p in model.hybrid.named_parameters() if p.requires_grad}
        tuned.save(model, weights, staging)

    inputs = {
        "data": data.path.name,
        "recommender": recommender.name,
        "backbone": to_dict(experiment.backbone)
        | {"source": fingerprint(experiment.backbone.source)},
        "prompt": to_dict(experiment.prompt) | {"wording": wording()},
        "stage": to_dict(stage),
        "projector": to_dict(experiment.projector),
        "catalogue": to_dict(experiment.catalogue) if history else None,
    }
    return store.get("stage-2", inputs, make)
