"""prepare -> recommender -> stage 1 -> stage 2: each a function from artifacts to an artifact.

Every artifact is keyed by its inputs, so a search, a reproduction and a resumed run share what
they have in common, and nothing is computed twice.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rsllm.assets import fetch, resolve_backbone
from rsllm.config import ComputeConfig, DataConfig, Experiment
from rsllm.errors import ConfigError
from rsllm.plan import Layout, Resources, cpu_has_bf16, lay_out
from rsllm.runs import Store, manifest, read_json, sha256
from rsllm.settings import to_dict

WORKER_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
"""Leaves the terminal to progress, warnings and errors; the print patch prints lines twice."""
DASHBOARD_PORT = 8265

KINDS = {"recommender": "recommender", "stage1": "stage-1", "stage2": "stage-2"}


def start_ray() -> str:
    """Join the cluster this process belongs to, or start one here with the dashboard on loopback.

    Returns:
        The dashboard's address.
    """
    import ray

    if not ray.is_initialized():
        port = _free_port()
        # Inherited by a Ray started here: two on one machine must not ask each other's dashboard.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        ray.init(
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            logging_level="WARNING",
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
        )
    address = f"http://{ray.get_runtime_context().worker.node.webui_url}"
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    return address


def _free_port() -> int:
    """The first port from the dashboard's usual one on that nobody listens to."""
    port = DASHBOARD_PORT
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
        port += 1


def cluster_resources() -> Resources:
    """What the cluster that Ray is connected to has."""
    import ray

    total = ray.cluster_resources()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return Resources(
        cpus=total.get("CPU", 0),
        gpus=total.get("GPU", 0),
        nodes=max(1, len(nodes)),
        bf16=cpu_has_bf16(),
    )


def lay_out_on_cluster(compute: ComputeConfig) -> Layout:
    """`rsllm.plan.lay_out` on the cluster that Ray is connected to."""
    start_ray()
    return lay_out(compute, cluster_resources())


class Pipeline:
    """One experiment's way from raw files to a tuned model.

    Args:
        experiment: what to run.
        storage: folder of the artifact store; every node of the cluster must see it.
        run_name: name of the Ray Train run of the last stage, unique among running ones.
        callbacks: Ray Train callbacks of the last stage.
    """

    def __init__(
        self,
        experiment: Experiment,
        storage: str | Path,
        *,
        run_name: str = "",
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.experiment = experiment
        self.store = Store.open(storage)
        self.run_name = run_name
        self.callbacks = callbacks

    @cached_property
    def layout(self) -> Layout:
        """How training runs are laid out on this cluster."""
        return lay_out_on_cluster(self.experiment.compute)

    @cached_property
    def backbone(self) -> str:
        """Local folder or hub name of the backbone."""
        return str(resolve_backbone(self.experiment.backbone.source))

    def check(self) -> None:
        """Find all raw data and the backbone, before Ray starts and anything is computed.

        Raises:
            ConfigError, DataError: one of them is not there, or no language model could use it.
        """
        from rsllm.data import sources
        from rsllm.data.shards import raw_location

        for config in (self.experiment.data, *(part.data for part in self.experiment.mixture)):
            if config.candidates == "full":
                raise ConfigError(
                    f"data.candidates of {config.source} is full, and no prompt holds all titles;"
                    " choose uniform or popularity"
                )
            with raw_location(config, fetch) as location:
                sources.find(location, config.table)
        _ = self.backbone

    def prepare(self) -> Path:
        """Raw files -> windows, splits and candidate sets."""
        return self._data

    @cached_property
    def _data(self) -> Path:
        return self._prepare(self.experiment.data)

    def _prepare(self, config: DataConfig) -> Path:
        from rsllm.data.shards import prepare

        return prepare(config, self.store, fetch, start_ray)

    def fit(self) -> Path:
        """Stage 0: the recommender and its frozen item table."""
        data = self.prepare()
        inputs = {"data": data.name, "recommender": to_dict(self.experiment.recommender)}
        return self._train("recommender", inputs, data=str(data))

    def train_text(self) -> Path:
        """Stage 1: the language model on text-only prompts."""
        self.check()
        data = self.prepare()
        keys = [[folder.name, weight] for folder, weight in self._mixture]
        return self._train(
            "stage1",
            self._language_inputs("stage1", data) | {"mixture": keys},
            data=str(data),
            backbone=self.backbone,
            mixture=[(str(folder), weight) for folder, weight in self._mixture],
        )

    def train(self) -> Path:
        """Stage 2: the language model and the projector on unified prompts."""
        inputs, folders = self._stage2
        return self._train("stage2", inputs, **folders)

    def finished(self) -> Path | None:
        """Stage 2's artifact if it exists; earlier stages must."""
        path = self.store.path(KINDS["stage2"], self._stage2[0])
        return path if path.exists() else None

    def discard(self) -> None:
        """Remove what a stage 2 that was stopped early left behind."""
        path = self.store.path(KINDS["stage2"], self._stage2[0])
        shutil.rmtree(self._checkpoints(KINDS["stage2"], path.name), ignore_errors=True)
        for staging in path.parent.glob(f".{path.name}.*.staging"):
            shutil.rmtree(staging, ignore_errors=True)

    def _checkpoints(self, kind: str, key: str) -> Path:
        return self.store.root / "running" / f"{kind}-{key}"

    @cached_property
    def _stage2(self) -> tuple[dict[str, Any], dict[str, str]]:
        self.check()
        data, recommender = self.prepare(), self.fit()
        start = self.train_text() if self.experiment.stage1.steps else None
        inputs = self._language_inputs("stage2", data) | {
            "recommender": recommender.name,
            "projector": to_dict(self.experiment.projector),
            "start": start.name if start else None,
        }
        folders = {
            "data": str(data),
            "backbone": self.backbone,
            "recommender": str(recommender),
            "start": str(start or ""),
        }
        return inputs, folders

    def _language_inputs(self, stage: str, data: Path) -> dict[str, Any]:
        experiment = self.experiment
        return {
            "data": data.name,
            "backbone": to_dict(experiment.backbone) | {"source": self.fingerprint},
            "prompt": to_dict(experiment.prompt),
            "stage": to_dict(getattr(experiment, stage)),
            "validation_rows": experiment.evaluation.validation_rows,
            "precision": self.layout.precision,
        }

    @cached_property
    def _mixture(self) -> list[tuple[Path, float]]:
        """Folders and weights of the further data sets of stage 1.

        Raises:
            ConfigError: two of the sets, the target domain among them, share users.
        """
        mixture = self.experiment.mixture
        mixed = [(self._prepare(part.data), part.weight) for part in mixture]
        users = [_users(folder) for folder in (self.prepare(), *(folder for folder, _ in mixed))]
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
        """Hash of a local backbone's weights; a hub name stands for itself."""
        folder = Path(self.backbone)
        if not folder.is_dir():
            return self.backbone
        weights = sorted(folder.glob("*.safetensors"))
        return "+".join(sha256(path)[:16] for path in weights)

    def _train(self, stage: Any, inputs: dict[str, Any], **sources: Any) -> Path:
        from rsllm.train.launch import Assignment, run

        _check_batch(self.experiment, stage, self.layout.workers)
        kind = KINDS[stage]
        key = self.store.path(kind, inputs).name
        checkpoints = self._checkpoints(kind, key)
        last = stage == "stage2"

        def make(staging: Path) -> None:
            assignment = Assignment(
                stage=stage,
                experiment=self.experiment,
                layout=self.layout,
                checkpoints=str(checkpoints),
                export=str(staging),
                **sources,
            )
            name = self.run_name if last and self.run_name else f"{kind}-{key}"
            run(
                assignment,
                name=name,
                storage=self.store.root / "ray",
                callbacks=self.callbacks if last else (),
            )

        path = self.store.get(kind, inputs, make)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return path


def _users(folder: Path) -> Any:
    """Equal for prepared data with the same users: of one family, or of the same raw files."""
    from rsllm.data.prepared import COUNTS

    return read_json(folder / COUNTS)["family"] or _hashes(manifest(folder)["inputs"]["raw"])


def _hashes(raw: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Of all raw files, whatever their names."""
    return sorted(hash_ for files in raw.values() for hash_ in files.values())


def _check_batch(experiment: Experiment, stage: str, workers: int) -> None:
    if stage == "recommender":
        size, parts = experiment.recommender.batch_size, workers
    else:
        config = getattr(experiment, stage)
        size, parts = config.batch_size, workers * config.accumulation
    if size % parts:
        raise ConfigError(
            f"{stage}.batch_size {size} does not divide into {parts} equal micro-batches;"
            " change it, compute.workers or accumulation"
        )
