"""prepare -> recommender -> stage 1 -> stage 2: each a function from artifacts to an artifact.

Every artifact is keyed by its inputs, so a search, a reproduction and a resumed run share what
they have in common, and nothing is computed twice.
"""

import re
from collections.abc import Callable, Sequence
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
from rsllm.train.assignment import STAGES, Assignment, Stage


@dataclass(frozen=True)
class StageInputs:
    """What a stage is made from."""

    key: dict[str, Any]
    """What decides its artifact: settings, and the keys of other artifacts."""
    folders: dict[str, Any]
    """Where its workers find those, as fields of an `Assignment`."""

    @classmethod
    def of(cls, **artifacts: Path | None) -> "StageInputs":
        """Take artifacts by their names, where None says that there is none."""
        return cls(
            key={name: path and path.name for name, path in artifacts.items()},
            folders={name: str(path or "") for name, path in artifacts.items()},
        )


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
        from rsllm.data import sources
        from rsllm.data.prepare import raw_location

        for config in (self.experiment.data, *(part.data for part in self.experiment.mixture)):
            if STAGES[self.watched].is_language_model and config.candidates == "full":
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
        return self._data if self.experiment.data.candidates != "recommender" else self._ranked

    @cached_property
    def _data(self) -> Path:
        """What recommender and keys are made from, whose candidates need no recommender."""
        data = self.experiment.data
        drawn = "uniform" if data.candidates == "recommender" else data.candidates
        return self._prepare(replace(data, candidates=drawn))

    @cached_property
    def _ranked(self) -> Path:
        """The same rows, with the titles that the recommender ranks highest as candidates."""
        from rsllm.evaluate.recommender_candidates import POOL, write_candidates

        data, fitted, store, experiment = self._data, self._fitted, self.store, self.experiment
        inputs = manifest(data)["inputs"]
        inputs["config"] |= {"candidates": "recommender"}
        whole, *folds = (path.name for path in fitted)
        inputs |= {"data": data.name, "recommender": whole, "folds": folds, "pool": POOL}

        def work() -> None:
            here = [store.local(path) for path in fitted]
            with store.commit("data", inputs) as folder:
                write_candidates(folder, store.local(data), here, experiment)

        return store.ensure(store.path("data", inputs), lambda: self._remote(work))

    def _prepare(self, config: DataConfig) -> Path:
        from rsllm.data.prepare import prepare

        return prepare(config, self.store, fetch, start_ray)

    def fit(self) -> Path:
        """Stage 0: the recommender and its frozen item table."""
        return self._train("recommender", self._recommender)

    def item_table(self) -> Path:
        """What fills the slots of stage 2: the recommender's item table, with cross-fitted ones."""
        from rsllm.recommenders.embeddings import ItemEmbeddings

        whole, *folds = self._fitted
        if not folds:
            return whole

        def make(folder: Path) -> None:
            tables = [ItemEmbeddings.load(path) for path in folds]
            ItemEmbeddings.load(whole).crossed_with(tables).save(folder)

        sources = {"recommender": whole.name, "folds": [path.name for path in folds]}
        return self.store.get("items", {"data": self._data.name, **sources}, make)

    @cached_property
    def _fitted(self) -> list[Path]:
        """The whole recommender, and those that are cross-fitted."""
        inputs, count, fitted = self._recommender, self.experiment.recommender.folds, [self.fit()]
        for fold in range(count):
            key, folders = {"fold": [fold, count]}, {"fold": fold}
            parts = StageInputs(inputs.key | key, inputs.folders | folders)
            fitted.append(self._train("recommender", parts))
        return fitted

    def title_vectors(self) -> Path:
        """The backbone's frozen vectors of all titles, as an item table."""
        backbone, data, prompt = self.backbone, self._data, self.experiment.prompt
        inputs = {"data": data.name, "backbone": self.fingerprint, "prompt": to_dict(prompt)}
        store, source, threads = self.store, self.experiment.backbone.source, self.layout.threads

        def work() -> None:
            from rsllm.data.prepared import PreparedData
            from rsllm.model.title_vectors import title_vectors
            from rsllm.recommenders.embeddings import ItemEmbeddings

            titles = PreparedData.open(store.local(data)).titles
            vectors_ID = title_vectors(backbone_here(backbone, source), titles, prompt, threads)
            with store.commit("titles", inputs) as folder:
                ItemEmbeddings(vectors_ID, source=backbone).save(folder)

        return store.ensure(store.path("titles", inputs), lambda: self._remote(work))

    def title_ngrams(self) -> Path:
        """Vectors of what titles are written like, as an item table: a part of the keys."""
        data, width = self._data, self.experiment.catalogue.title_width

        def make(folder: Path) -> None:
            from rsllm.data.prepared import PreparedData
            from rsllm.recommenders.embeddings import ItemEmbeddings
            from rsllm.recommenders.ngrams import title_vectors

            vectors_IF = title_vectors(PreparedData.open(self.store.local(data)).titles, width)
            ItemEmbeddings(vectors_IF, source=data.name).save(folder)

        return self.store.get("titles", {"data": data.name, "ngrams": width}, make)

    def train_keys(self, stage: StageConfig | None = None) -> Path:
        """The keys of the catalogue scorer alone, by default for the items of stage 2."""
        return self._train("keys", self._keys(stage or self.experiment.stage2))

    def train_text(self) -> Path:
        """Stage 1: the language model, by default on text-only prompts."""
        return self._train("stage1", self._stage1)

    def train(self) -> Path:
        """Stage 2: the language model and the projector, by default on unified prompts."""
        return self._train("stage2", self._stage2)

    def run(self) -> Path:
        """The watched stage, and all that it is made from."""
        return self._train(self.watched, self._watched)

    def finished(self) -> Path | None:
        """The watched stage's artifact if it exists; what it is made from is made if need be."""
        return self._watched_path if self.store.holds(self._watched_path) else None

    def discard(self) -> None:
        """Remove what a watched stage that was stopped early left behind."""
        path = self._watched_path
        self.store.remove(f"running/{path.parent.name}-{path.name}")

    @property
    def _watched_path(self) -> Path:
        return self.store.path(STAGES[self.watched].kind, self._watched.key)

    @property
    def _watched(self) -> StageInputs:
        match self.watched:
            case "recommender":
                return self._recommender
            case "keys":
                return self._keys(self.experiment.stage2)
            case "stage1":
                return self._stage1
            case "stage2":
                return self._stage2

    @cached_property
    def _recommender(self) -> StageInputs:
        config = self.experiment.recommender
        titles = self.title_vectors() if config.items == "title" else None
        inputs = StageInputs.of(data=self._data, titles=titles)
        # It is the same however many others are cross-fitted.
        inputs.key["recommender"] = to_dict(replace(config, folds=0))
        return inputs

    def _keys(self, stage: StageConfig) -> StageInputs:
        items = self.item_table() if stage.representation in SLOTTED else None
        titles = self.title_ngrams()
        inputs = StageInputs.of(data=self._data, recommender=items, titles=titles)
        inputs.key["catalogue"] = to_dict(self.experiment.catalogue)
        inputs.key["history_items"] = self.experiment.prompt.history_items
        inputs.key["shuffle_items"] = self.experiment.projector.shuffle_items
        return inputs

    @cached_property
    def _stage1(self) -> StageInputs:
        self.check()
        inputs = self._language_model(self.experiment.stage1)
        inputs.key["mixture"] = [[folder.name, weight] for folder, weight in self._mixture]
        inputs.folders["mixture"] = [(str(folder), weight) for folder, weight in self._mixture]
        return inputs

    @cached_property
    def _stage2(self) -> StageInputs:
        self.check()
        start = self.train_text() if self.experiment.stage1.steps else None
        return self._language_model(self.experiment.stage2, start=start)

    def _language_model(self, stage: StageConfig, **artifacts: Path | None) -> StageInputs:
        experiment, history = self.experiment, stage.prompts == "history"
        items = self.item_table() if stage.representation in SLOTTED else None
        if history:
            keys = self.train_keys(stage) if experiment.catalogue.max_epochs else None
            artifacts |= {"titles": self.title_ngrams(), "keys": keys}
        inputs = StageInputs.of(data=self.prepare(), recommender=items, **artifacts)
        inputs.key.update(
            backbone=to_dict(experiment.backbone) | {"source": self.fingerprint},
            prompt=to_dict(experiment.prompt) | {"wording": wording()},
            stage=to_dict(stage),
            projector=to_dict(experiment.projector) if items else None,
            catalogue=to_dict(experiment.catalogue) if history else None,
            validation_rows=experiment.evaluation.validation_rows,
            precision=self.layout.precision,
        )
        inputs.folders["backbone"] = self.backbone
        return inputs

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

    def _remote(self, work: Callable[[], None]) -> None:
        """Run `work` where a worker has room."""
        import ray

        try:
            ray.get(ray.remote(work).options(num_cpus=self.layout.cpus_per_worker).remote())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _train(self, stage: Stage, inputs: StageInputs) -> Path:
        from rsllm.train.launch import run

        config = getattr(self.experiment, STAGES[stage].section)
        # Recommender and keys do not accumulate.
        parts = self.layout.workers * getattr(config, "accumulation", 1)
        if config.batch_size % parts:
            raise ConfigError(
                f"{stage}'s batch_size {config.batch_size} does not divide into {parts} equal"
                " micro-batches; change it, compute.workers or accumulation"
            )
        watched = stage == self.watched
        assignment = Assignment(
            stage=stage,
            experiment=self.experiment,
            layout=self.layout,
            store=self.store,
            inputs=inputs.key,
            **inputs.folders,
        )

        def commit() -> None:
            (self.store.root / "running" / assignment.name).mkdir(parents=True, exist_ok=True)
            run(
                assignment,
                name=self.run_name if watched and self.run_name else assignment.name,
                storage=self.store.root / "ray",
                callbacks=self.callbacks if watched else (),
            )

        path = self.store.ensure(self.store.path(STAGES[stage].kind, inputs.key), commit)
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


def _users(folder: Path) -> Any:
    """Equal for prepared data with the same users: of one family, or of the same raw files."""
    from rsllm.data.prepared import COUNTS

    raw = manifest(folder)["inputs"]["raw"]
    hashes = sorted(hash_ for files in raw.values() for hash_ in files.values())
    return read_json(folder / COUNTS)["family"] or hashes
