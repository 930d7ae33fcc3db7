"""prepare -> recommender -> stage 1 -> stage 2: each a function from artifacts to an artifact.

Every artifact is keyed by its inputs, so a search, a reproduction and a resumed run share what
they have in common, and nothing is computed twice.
"""

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rsllm.assets.catalogue import backbone_here, fetch, fingerprint, resolve_backbone
from rsllm.compute.layout import DRIVER_CPUS, Layout
from rsllm.compute.start import lay_out_on_cluster, start_ray
from rsllm.config import SLOTTED, DataConfig, Experiment, StageConfig
from rsllm.config.plain import to_dict
from rsllm.errors import ConfigError
from rsllm.prompts.templates import wording
from rsllm.store.artifacts import Store, manifest, read_json
from rsllm.train.worker import SECTION, Assignment, Stage

KINDS = {
    "recommender": "recommender",
    "keys": "keys",
    "stage1": "stage-1",
    "stage2": "stage-2",
}
Sources = tuple[dict[str, Any], dict[str, Any]]
"""What decides an artifact, its sources by their names, and these by their folders."""


@dataclass(eq=False)
class Pipeline:
    """One experiment's way from raw files to a tuned model.

    Args:
        experiment: what to run.
        storage: folder of the artifact store, which every node of the cluster must see, or a URI.
        run_name: name of the Ray Train run of `watched`, unique among running ones.
        callbacks: Ray Train callbacks of `watched`.
        watched: the stage that a search tunes.

    Raises:
        ConfigError: a run name that is no plain file name, or a storage that cannot be used.
    """

    experiment: Experiment
    storage: InitVar[str | Path]
    _: KW_ONLY
    run_name: str = ""
    callbacks: Sequence[Any] = ()
    watched: Stage = "stage2"

    def __post_init__(self, storage: str | Path) -> None:
        if self.run_name and not re.fullmatch(r"\w[\w.-]{0,63}", self.run_name, re.ASCII):
            raise ConfigError(f"run_name is {self.run_name!r}; use at most 64 of a-z A-Z 0-9 . _ -")
        self.store = Store.open(storage)

    @cached_property
    def layout(self) -> Layout:
        """How training runs are laid out on this cluster."""
        return lay_out_on_cluster(self.experiment.compute)

    @cached_property
    def backbone(self) -> str:
        """Local folder of the backbone, which is checked before anything is made with it."""
        from rsllm.model.backbone import check_backbone

        folder = resolve_backbone(self.experiment.backbone.source)
        check_backbone(folder, self.experiment)
        return str(folder)

    @property
    def needs_backbone(self) -> bool:
        """Whether what is watched is a language model, or reads titles with one."""
        return self.watched != "recommender" or self.experiment.recommender.items == "title"

    def check(self) -> None:
        """Find all raw data and the backbone, before Ray starts and anything is computed.

        Raises:
            ConfigError, DataError: one of them is not there, or no language model could use it.
        """
        speaks = self.watched in ("stage1", "stage2")
        from rsllm.data import sources
        from rsllm.data.prepare import raw_location

        for config in (self.experiment.data, *(part.data for part in self.experiment.mixture)):
            if speaks and config.candidates == "full":
                raise ConfigError(
                    f"data.candidates of {config.source} is full, and no prompt holds all titles;"
                    " choose uniform or popularity"
                )
            with raw_location(config, fetch) as location:
                sources.find(location, config.table, config.layout)
        if self.needs_backbone:
            _ = self.backbone

    def prepare(self) -> Path:
        """Raw files -> windows, splits and candidate sets; those of the mixture too.

        Raises:
            ConfigError: two data sets of the mixture, the target domain among them, share users.
        """
        _ = self._mixture
        return self._data

    @cached_property
    def _data(self) -> Path:
        return self._prepare(self.experiment.data)

    def _prepare(self, config: DataConfig) -> Path:
        from rsllm.data.prepare import prepare

        return prepare(config, self.store, fetch, start_ray)

    def fit(self) -> Path:
        """Stage 0: the recommender and its frozen item table."""
        return self._train("recommender", *self._recommender)

    def item_table(self) -> Path:
        """What fills the slots of stage 2: the recommender's item table, with cross-fitted ones."""
        from rsllm.recommenders.embeddings import ItemEmbeddings

        whole, (inputs, folders) = self.fit(), self._recommender
        count = self.experiment.recommender.folds
        folds = [
            self._train("recommender", inputs | {"fold": [fold, count]}, folders | {"fold": fold})
            for fold in range(count)
        ]
        if not folds:
            return whole

        def make(folder: Path) -> None:
            tables = [ItemEmbeddings.load(path) for path in folds]
            ItemEmbeddings.load(whole).crossed_with(tables).save(folder)

        made_of = {"recommender": whole.name, "folds": [path.name for path in folds]}
        return self.store.get("items", {"data": self.prepare().name, **made_of}, make)

    def title_vectors(self) -> Path:
        """The backbone's frozen vectors of all titles, as an item table."""
        backbone, data, prompt = self.backbone, self.prepare(), self.experiment.prompt
        inputs = {"data": data.name, "backbone": self.fingerprint, "prompt": to_dict(prompt)}

        def commit() -> None:
            import ray

            from rsllm.data.prepared import PreparedData
            from rsllm.model.titles import title_vectors
            from rsllm.recommenders.embeddings import ItemEmbeddings

            store, threads = self.store, self.layout.threads
            source = self.experiment.backbone.source

            def work() -> None:
                titles = PreparedData.open(store.local(data)).titles
                here = backbone_here(backbone, source)
                vectors_ID = title_vectors(here, titles, prompt, threads)
                with store.commit("titles", inputs) as folder:
                    ItemEmbeddings(vectors_ID, source=backbone).save(folder)

            remote = ray.remote(work).options(num_cpus=self.layout.cpus_per_worker)
            try:
                ray.get(remote.remote())
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error

        return self.store.ensure(self.store.path("titles", inputs), commit)

    def title_ngrams(self) -> Path:
        """Vectors of what titles are written like, as an item table: a part of the keys."""
        data, width = self.prepare(), self.experiment.catalogue.title_width

        def make(folder: Path) -> None:
            from rsllm.data.prepared import PreparedData
            from rsllm.recommenders.embeddings import ItemEmbeddings
            from rsllm.recommenders.ngrams import title_vectors

            vectors_IF = title_vectors(PreparedData.open(self.store.local(data)).titles, width)
            ItemEmbeddings(vectors_IF, source=data.name).save(folder)

        return self.store.get("titles", {"data": data.name, "ngrams": width}, make)

    def train_keys(self, stage: StageConfig | None = None) -> Path:
        """The keys of the catalogue scorer alone, by default for the items of stage 2."""
        stage = stage or self.experiment.stage2
        items = self.item_table() if stage.representation in SLOTTED else None
        names, folders = _sources(
            data=self.prepare(), recommender=items, titles=self.title_ngrams()
        )
        longest = self.experiment.prompt.history_items
        decides = {"catalogue": to_dict(self.experiment.catalogue), "history_items": longest}
        shuffled = {"shuffle_items": self.experiment.projector.shuffle_items}
        return self._train("keys", names | decides | shuffled, folders)

    def train_text(self) -> Path:
        """Stage 1: the language model, by default on text-only prompts."""
        return self._train("stage1", *self._stage1)

    def train(self) -> Path:
        """Stage 2: the language model and the projector, by default on unified prompts."""
        return self._train("stage2", *self._stage2)

    def run(self) -> Path:
        """The stage that is watched, and all before it."""
        ways = {"recommender": self.fit, "keys": self.train_keys, "stage1": self.train_text}
        return ways.get(self.watched, self.train)()

    def finished(self) -> Path | None:
        """The watched stage's artifact if it exists; earlier stages must."""
        return self._watched_path if self.store.holds(self._watched_path) else None

    def discard(self) -> None:
        """Remove what a watched stage that was stopped early left behind."""
        self.store.remove(f"running/{KINDS[self.watched]}-{self._watched_path.name}")

    @property
    def _watched_path(self) -> Path:
        inputs, _ = self._recommender if self.watched == "recommender" else self._stage2
        return self.store.path(KINDS[self.watched], inputs)

    @cached_property
    def _recommender(self) -> Sources:
        """What decides the recommender (not how many others are cross-fitted), and its sources."""
        config = self.experiment.recommender
        titles = self.title_vectors() if config.items == "title" else None
        names, folders = _sources(data=self.prepare(), titles=titles)
        return names | {"recommender": to_dict(replace(config, folds=0))}, folders

    @cached_property
    def _stage1(self) -> Sources:
        self.check()
        keys = [[folder.name, weight] for folder, weight in self._mixture]
        mixture = [(str(folder), weight) for folder, weight in self._mixture]
        inputs, folders = self._language(self.experiment.stage1)
        return inputs | {"mixture": keys}, folders | {"mixture": mixture}

    @cached_property
    def _stage2(self) -> Sources:
        self.check()
        start = self.train_text() if self.experiment.stage1.steps else None
        return self._language(self.experiment.stage2, start=start)

    def _language(self, stage: StageConfig, **more: Path | None) -> Sources:
        """What decides a language-model stage, with more sources; stage 1 has a mixture beside."""
        experiment, data = self.experiment, self.prepare()
        items = self.item_table() if stage.representation in SLOTTED else None
        if stage.prompts == "history":
            keys = self.train_keys(stage) if experiment.catalogue.max_epochs else None
            more = {**more, "titles": self.title_ngrams(), "keys": keys}
        names, folders = _sources(data=data, recommender=items, **more)
        inputs = names | {
            "backbone": to_dict(experiment.backbone) | {"source": self.fingerprint},
            "prompt": to_dict(experiment.prompt) | {"wording": wording()},
            "stage": to_dict(stage),
            "projector": to_dict(experiment.projector) if items else None,
            "catalogue": to_dict(experiment.catalogue) if stage.prompts == "history" else None,
            "validation_rows": experiment.evaluation.validation_rows,
            "precision": self.layout.precision,
        }
        return inputs, folders | {"backbone": self.backbone}

    @cached_property
    def _mixture(self) -> list[tuple[Path, float]]:
        """Folders and weights of the further data sets of stage 1."""
        mixture = self.experiment.mixture
        mixed = [(self._prepare(part.data), part.weight) for part in mixture]
        users = [_users(folder) for folder in (self._data, *(folder for folder, _ in mixed))]
        again = next((i for i, who in enumerate(users) if who in users[:i]), None)
        if again is not None:
            names = [self.experiment.data.source, *(part.data.source for part in mixture)]
            raise ConfigError(
                f"mixture: {names[users.index(users[again])]} and {names[again]} have the same"
                " users, so interactions held out in one can be training rows of the other; keep"
                " one of them"
            )
        return mixed

    @cached_property
    def fingerprint(self) -> str:
        """What decides all that the backbone computes."""
        return fingerprint(self.backbone)

    def _train(self, stage: Stage, inputs: dict[str, Any], folders: dict[str, Any]) -> Path:
        from rsllm.train.launch import run

        _check_batch(self.experiment, stage, self.layout.workers)
        watched = stage == self.watched
        assignment = Assignment(
            stage=stage,
            experiment=self.experiment,
            layout=self.layout,
            store=self.store,
            kind=KINDS[stage],
            inputs=inputs,
            **folders,
        )

        def commit() -> None:
            (self.store.root / "running" / assignment.name).mkdir(parents=True, exist_ok=True)
            run(
                assignment,
                name=self.run_name if watched and self.run_name else assignment.name,
                storage=self.store.root / "ray",
                callbacks=self.callbacks if watched else (),
            )

        path = self.store.ensure(self.store.path(KINDS[stage], inputs), commit)
        self.store.remove(f"running/{assignment.name}")
        return path


def run_all(pipelines: Sequence[Pipeline]) -> list[Path]:
    """The watched stages of several pipelines, as many side by side as the machine has room for.

    Raises:
        RsllmError: what the first to fail raised.
    """
    import ray

    def drive(experiment: Experiment, storage: str, run_name: str, watched: Stage) -> Path:
        return Pipeline(experiment, storage, run_name=run_name, watched=watched).run()

    work, pending = ray.remote(num_cpus=DRIVER_CPUS)(drive), list[Any]()
    for pipeline in pipelines:
        if len(pending) >= pipeline.layout.concurrent_trials:
            ray.wait(pending, num_returns=len(pending) - pipeline.layout.concurrent_trials + 1)
        where, name = pipeline.store.location, pipeline.run_name
        named = work.options(name=name or "drive")
        pending.append(named.remote(pipeline.experiment, where, name, pipeline.watched))
    try:
        made = zip(pipelines, ray.get(pending), strict=True)
        return [pipeline.store.local(path) for pipeline, path in made]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _sources(**folders: Path | None) -> Sources:
    names = {source: folder and folder.name for source, folder in folders.items()}
    return names, {source: str(folder or "") for source, folder in folders.items()}


def _users(folder: Path) -> Any:
    """Equal for prepared data with the same users: of one family, or of the same raw files."""
    from rsllm.data.prepared import COUNTS

    raw = manifest(folder)["inputs"]["raw"]
    hashes = sorted(hash_ for files in raw.values() for hash_ in files.values())
    return read_json(folder / COUNTS)["family"] or hashes


def _check_batch(experiment: Experiment, stage: Stage, workers: int) -> None:
    config = getattr(experiment, SECTION[stage])  # of which recommender and keys do not accumulate
    size, parts = config.batch_size, workers * getattr(config, "accumulation", 1)
    if size % parts:
        raise ConfigError(
            f"{stage}'s batch_size {size} does not divide into {parts} equal micro-batches;"
            " change it, compute.workers or accumulation"
        )
