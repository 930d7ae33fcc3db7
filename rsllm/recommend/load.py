"""Opens an artifact of the store, or an exported model, as a `Ranker`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsllm import runs
from rsllm.assets.catalogue import (
    DECIDING,
    HUB_NAME,
    base_of,
    fingerprint,
    from_hub,
    hub_version,
    resolve_backbone,
)
from rsllm.compute.layout import Layout, Resources, cpu_has_bf16, lay_out
from rsllm.config import CatalogueConfig, ComputeConfig, Experiment, Precision, StageConfig
from rsllm.config.plain import from_dict, replace_in
from rsllm.errors import CheckpointError, ConfigError, require
from rsllm.store.artifacts import Store, cache_root, manifest, staged
from rsllm.store.versions import VERSIONS
from rsllm.train.assignment import STAGES

if TYPE_CHECKING:
    from rsllm.data.prepared import PreparedData
    from rsllm.data.sequences import Rows
    from rsllm.evaluate.metrics import Floats
    from rsllm.recommend.ranker import Ranker

LANGUAGE_MODELS = tuple(stage.kind for stage in STAGES.values() if stage.is_language_model)
LOADABLE = ("recommender", *LANGUAGE_MODELS)
ROWS_AT_ONCE = 32
"""Histories that the language model reads together, where whoever asks gives more."""


def load(
    model: str | Path,
    *,
    storage: str | Path = "rsllm-store",
    ranker: str = "auto",
    precision: Precision = "auto",
) -> Ranker:
    """Open a trained model to recommend with it.

    Args:
        model: an artifact: its name KIND/KEY or the beginning of it, or its folder; or what
            `rsllm export` made: a folder, or its name on the hub.
        storage: the store that has it; of what was exported without titles, that has its data.
        ranker: what ranks: `recommender`, `catalogue`, `pointer`, `likelihood` or `fused`, as far
            as the model has them; `auto` takes what did best on validation users by the task as
            deployed (`rsllm.recommend.choose`).
        precision: of the language model; fp32, bf16 or what the hardware is made for.

    Raises:
        ConfigError: there is no such model, none that could rank, or another backbone than it was
            trained on.
        CheckpointError: a file of it is missing or damaged.
    """
    from rsllm.recommend.choose import chosen

    opened, store = open_ranker(model, storage, precision)
    return chosen(opened, store, ranker)


def open_ranker(
    model: str | Path, storage: str | Path, precision: Precision
) -> tuple[Ranker, Store]:
    """What `load` gives before anything is chosen, and the store for what is made with it."""
    from rsllm.data.prepared import PreparedData
    from rsllm.recommend.ranker import Ranker

    store, folder = locate(model, storage)
    facts = manifest(folder, verify=True)
    kind, inputs = facts["kind"], facts["inputs"]
    exported = from_dict(Exported, facts["exported"]) if "exported" in facts else None
    name = hub_version(folder) or (exported.name if exported else store.name(folder))
    require(kind in LOADABLE, f"{name} ranks nothing; load a {' or a '.join(LOADABLE)}")
    data = PreparedData.open(_data_of(inputs["data"], store, Store.at(storage)))
    fitted = folder if kind == "recommender" else recommender_of(inputs, store)
    tuned = None if kind == "recommender" else Tuned(folder, inputs, data, here(precision))
    opened = Ranker(
        name=name,
        data=data,
        vectors_IE=_vectors(folder, data),
        recommender=_scores_of(fitted, data) if fitted else None,
        language=tuned,
    )
    if exported is None:
        return opened, store
    opened = replace(opened, by=exported.by, weight=exported.weight, why=exported.why)
    return replace(opened, exported=str(folder)), Store.at(storage)


def locate(model: str | Path, storage: str | Path) -> tuple[Store, Path]:
    """The store of an artifact, and its folder on this node.

    What was exported is a store by itself.

    Raises:
        ConfigError: there is none of this name, or more than one.
    """
    path = Path(model)
    named = HUB_NAME.fullmatch(str(model)) and str(model).partition("/")[0] not in VERSIONS
    if named and not path.is_dir():
        path = _downloaded(str(model))
    if path.is_dir():
        folder = path.absolute()
        return Store.at(folder if is_exported(folder) else folder.parent.parent), folder
    store = Store.at(storage)
    found = runs.find(runs.read_artifacts(store), str(model), store)
    return store, store.local(store.root / found.name)


def is_exported(folder: Path) -> bool:
    """Whether a folder is what `rsllm export` makes.

    Raises:
        CheckpointError: it is no artifact at all.
    """
    return "exported" in manifest(folder)


def _downloaded(name: str) -> Path:
    """An exported model of the hub, whose cache has no files but links to some."""
    snapshot = from_hub(name, [*DECIDING, "*.parquet", "README.md"])
    folder = cache_root() / "hub" / snapshot.relative_to(snapshot.parents[2])
    if not folder.exists():
        with staged(folder) as staging:
            shutil.copytree(snapshot, staging, dirs_exist_ok=True)
    if not is_exported(folder):
        raise CheckpointError(f"{name} is no model that rsllm export made")
    return folder


def _data_of(key: str, *stores: Store) -> Path:
    """The prepared data, of the first store that has them."""
    for store in stores:
        if store.holds(path := store.root / "data" / key):
            return path
    places = " nor in ".join(dict.fromkeys(store.location for store in stores))
    raise ConfigError(
        f"data/{key} is not in {places}; where titles were left out of an exported"
        " model, prepare its data as its card says"
    )


def here(precision: Precision = "auto") -> Layout:
    """How this process computes: on its GPU if it has one, else with the threads that torch has."""
    import torch

    gpus = int(torch.cuda.is_available())
    own = Resources(cpus=torch.get_num_threads(), gpus=gpus, bf16=cpu_has_bf16())
    return lay_out(ComputeConfig(precision=precision), own)


@dataclass(frozen=True)
class Exported:
    """What an exported model says of the artifact that it was, and of what ranks."""

    name: str
    by: str
    weight: float
    why: str


@dataclass(eq=False)
class Tuned:
    """A tuned language model, which is read from disk when it is first asked."""

    folder: Path
    inputs: dict[str, Any]
    """What decides the artifact."""
    data: PreparedData
    layout: Layout

    @cached_property
    def stage(self) -> StageConfig:
        return from_dict(StageConfig, self.inputs["stage"])

    @property
    def scorer(self) -> str:
        return self.stage.ranks_by

    @property
    def num_candidates(self) -> int:
        return 0 if self.scorer == "catalogue" else int(self.data.config["num_candidates"])

    def __call__(self, rows: Rows) -> Floats:
        from rsllm.evaluate.rank import score_candidates, score_catalogue

        objective, encoder = self.model
        if self.scorer == "catalogue":
            return score_catalogue(objective, rows, encoder, batch_size=ROWS_AT_ONCE)
        how: Any = {"scorer": self.scorer, "batch_size": ROWS_AT_ONCE}
        return score_candidates(objective, rows, encoder, self.data, **how)

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """The model on its device, and the encoder of its prompts.

        Raises:
            ConfigError: the backbone is not the one that was tuned, or its prompts are not those.
        """
        import transformers

        from rsllm.evaluate.run import Method, load_objective
        from rsllm.prompts.templates import wording

        base, known = base_of(self.folder), self.inputs["backbone"]["source"]
        source = base or str(self.folder)
        backbone = resolve_backbone(source, commit=known.partition("@")[2])
        require(
            not base or fingerprint(backbone) == known,
            f"{self.folder} was tuned on another {source} than the one in {backbone}; bring that"
            " one back, or train it again",
        )
        require(
            self.inputs["prompt"]["wording"] == wording(),
            f"{self.folder} was tuned on prompts that this rsllm words otherwise; load it with the"
            " version that its manifest names",
        )
        method = Method(
            name=self.folder.name,
            scorer=self.scorer,
            experiment=self._experiment(source),
            representation=self.stage.representation,
            prompts=self.stage.prompts,
            artifact=str(self.folder),
        )
        transformers.logging.disable_progress_bar()
        with warnings.catch_warnings():  # of peft, about names of transformers' own
            warnings.simplefilter("ignore", FutureWarning)
            return load_objective(method, self.data, str(backbone), self.layout)

    def _experiment(self, source: str) -> Experiment:
        """The settings that the artifact names, among the defaults of all others."""
        parts = ("backbone", "prompt", "projector", "catalogue")
        named = {part: self.inputs[part] for part in parts if self.inputs.get(part)}
        named["backbone"] = named["backbone"] | {"source": source}
        if not base_of(self.folder):
            named["backbone"]["tuning"] = "full"
        named["prompt"] = {n: value for n, value in named["prompt"].items() if n != "wording"}
        return replace_in(Experiment(), named)


def recommender_of(inputs: dict[str, Any], store: Store) -> Path | None:
    """The recommender whose vectors fill the slots of a tuned model."""
    key = inputs["recommender"]
    if key is None:
        return None
    crossed = store.root / "items" / key
    if store.holds(crossed):
        key = manifest(crossed)["inputs"]["recommender"]
    return store.local(store.root / "recommender" / key)


def _scores_of(folder: Path, data: PreparedData) -> Callable[[Rows], Floats]:
    """A recommender's scores of the whole catalogue."""
    from rsllm.evaluate.run import Method
    from rsllm.evaluate.scorers import catalogue_scorer

    name, settings = "recommender", manifest(folder)["inputs"]["recommender"]
    experiment = replace_in(Experiment(), {name: settings})
    method = Method(name=name, scorer=name, experiment=experiment, artifact=str(folder))
    return catalogue_scorer(name).make(method, data)


def _vectors(folder: Path, data: PreparedData) -> Floats:
    """What says how alike items are: a tuned model's keys, a recommender's vectors, or titles."""
    from rsllm.model import tuned
    from rsllm.recommenders import embeddings, ngrams

    if (folder / tuned.CATALOGUE).exists():
        vectors_IE = tuned.stored_keys(folder)
    elif (folder / embeddings.FILE).exists():
        vectors_IE = embeddings.ItemEmbeddings.load(folder).table_IE
    else:
        vectors_IE = ngrams.title_vectors(data.titles, CatalogueConfig().title_width)
    return vectors_IE.double().numpy()
