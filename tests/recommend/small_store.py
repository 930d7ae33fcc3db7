"""A store with a recommender and tuned models, made without Ray or training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model.small_models import stir
from small_data import NUM_CANDIDATES, TITLES, WINDOW, small_data

from rsllm import recommenders
from rsllm.assets.catalogue import fingerprint, resolve_backbone
from rsllm.config import SLOTTED, Experiment, StageConfig
from rsllm.config.plain import content_hash, replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.model import tuned
from rsllm.prompts.templates import wording
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.recommenders.ngrams import title_vectors
from rsllm.report.card import write_card
from rsllm.store.artifacts import Store, write_json

DATA = content_hash("small")
TITLE_WIDTH = 6
SMALL = {
    "data.window": WINDOW,
    "data.num_candidates": NUM_CANDIDATES,
    "recommender.width": 8,
    "backbone.lora_rank": 3,
    "projector.hidden": 8,
    "catalogue.title_width": TITLE_WIDTH,
    "prompt.history_items": 4,
    "prompt.max_title_tokens": 8,
}
CURVE = {"HR@1": 0.4, "HR@5": 1.0, "HR@10": 1.0, "MRR": 0.5, "seconds": 1.0} | {
    "tokens_per_second": 1.0,
    "targets/all/MRR_low": 0.25,
    "targets/all/MRR_high": 0.75,
}


def data_of(store: Store) -> PreparedData:
    folder = store.root / "data" / DATA
    return PreparedData.open(folder) if folder.exists() else small_data(folder)


def recommender(store: Store, *, folds: bool = False) -> Path:
    """SASRec at random, or the item table of several of them."""
    experiment, data = replace_in(Experiment(), SMALL), data_of(store)
    inputs = {"data": DATA, "recommender": to_dict(experiment.recommender), "titles": None}

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        model = recommenders.build(experiment.recommender, len(data.titles), WINDOW)
        stir(model, 0.3)
        recommenders.save(model, folder)
        ItemEmbeddings(model.item_table.detach().clone(), "made up").save(folder)

    whole = store.get("recommender", inputs, make)
    if not folds:
        return whole
    crossed = {"data": DATA, "recommender": whole.name, "folds": ["made up"]}
    table = ItemEmbeddings.load(whole)
    return store.get("items", crossed, table.crossed_with([table, table]).save)


def language_model(
    store: Store, backbone: str, *, stage: str = "stage2", folds: bool = False, **settings: Any
) -> Path:
    """A stage's artifact on a backbone, which is a folder or a hub's name."""
    experiment = replace_in(Experiment(), SMALL | {"backbone.source": backbone} | settings)
    config: StageConfig = getattr(experiment, stage)
    data, form, slotted = data_of(store), config.prompts, config.representation in SLOTTED
    items = recommender(store, folds=folds) if slotted else None
    here = resolve_backbone(backbone)
    inputs = {
        "data": DATA,
        "recommender": items and items.name,
        "backbone": to_dict(experiment.backbone) | {"source": fingerprint(here)},
        "prompt": to_dict(experiment.prompt) | {"wording": wording()},
        "stage": to_dict(config),
        "projector": to_dict(experiment.projector) if slotted else None,
        "catalogue": to_dict(experiment.catalogue) if form == "history" else None,
    }
    kind = f"stage-{stage[-1]}"

    def make(folder: Path) -> None:
        model = tuned.build(
            experiment,
            config.representation,
            here,
            data,
            ItemEmbeddings.load(items) if items else None,
            dtype=torch.float32,
            form=form,
            titles_IF=title_vectors(TITLES, TITLE_WIDTH) if form == "history" else None,
        )
        stir(model.hybrid, 0.05)
        weights = {n: p.detach() for n, p in model.hybrid.named_parameters() if p.requires_grad}
        tuned.save(model, weights, folder)
        write_json(folder / "training.json", {"curve": [CURVE]})
        write_card(
            folder,
            name=store.name(store.path(kind, inputs)),
            experiment=experiment,
            stage=stage,
            inputs=inputs,
            start="the backbone",
            data=[(data, 10)],
            validation=CURVE,
            num_validated=5,
            num_trained=17,
            seconds=12.3,
            precision="fp32",
        )

    return store.get(kind, inputs, make)


def make_store(folder: Path, backbone: Path) -> tuple[Store, dict[str, str]]:
    """The store, and its artifacts by their names: recommender, history, choice."""
    store = Store.open(folder)
    pointer = {"stage2.loss.gamma": 1.0, "stage2.loss.scorer": "pointer"}
    made = {
        "recommender": recommender(store),
        "history": language_model(store, str(backbone), **{"stage2.prompts": "history"}),
        "choice": language_model(store, str(backbone), **pointer),
    }
    return store, {form: store.name(artifact) for form, artifact in made.items()}
