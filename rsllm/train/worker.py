"""One worker of a stage, from imports to the artifact in the store."""

import contextlib
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from rsllm.assets.catalogue import backbone_here
from rsllm.compute.layout import Layout
from rsllm.config import Experiment
from rsllm.errors import CheckpointError, ConfigError
from rsllm.store.artifacts import Store, not_on_storage, write_json

Stage = Literal["recommender", "keys", "stage1", "stage2"]
SECTION: dict[Stage, str] = {
    "recommender": "recommender",
    "keys": "catalogue",
    "stage1": "stage1",
    "stage2": "stage2",
}
"""The section of an `Experiment` that says how a stage is trained, its seed included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What the workers of one run are to do; folders are those of the driver's node."""

    stage: Stage
    experiment: Experiment
    layout: Layout
    store: Store
    kind: str
    inputs: dict[str, Any]
    """With its kind, what decides the artifact."""
    data: str
    backbone: str = ""
    titles: str = ""
    """Folder of title vectors: they stand for the items of a recommender (empty: ids do), or are a
    part of the catalogue scorer's keys."""
    keys: str = ""
    """Folder of the keys that the catalogue scorer starts from; empty starts at the rule."""
    fold: int | None = None
    """The part of the training users that a cross-fitted recommender does not see."""
    recommender: str = ""
    """Folder of the item table that fills the slots; empty for prompts without slots."""
    mixture: Sequence[tuple[str, float]] = ()
    """Folders and weights of the further data sets of stage 1."""
    start: str = ""
    """Folder of the adapter to continue from; empty starts fresh."""

    @property
    def name(self) -> str:
        """Names the run."""
        return f"{self.kind}-{self.store.path(self.kind, self.inputs).name}"

    @property
    def checkpoints(self) -> str:
        """Their location."""
        return self.store.below(f"running/{self.name}")


def work(config: dict[str, Assignment]) -> None:
    """What each worker runs under Ray Train.

    Raises:
        ConfigError: this node does not see the storage.
    """
    assignment = config["assignment"]
    _require_storage(assignment)
    _prepare_process(assignment.layout)

    import ray.train
    import torch.distributed as dist

    from rsllm.train.card import write_card
    from rsllm.train.checkpoints import Checkpoints
    from rsllm.train.engine import Engine
    from rsllm.train.loop import train
    from rsllm.train.watch import Watch

    compute = assignment.experiment.compute
    task = build_task(assignment)
    engine = Engine(task.objective, task.optimization, **_engine_settings(assignment))
    checkpoints = Checkpoints(assignment.checkpoints)
    watch = Watch(compute.checkpoint_seconds, compute.timeout_seconds)
    with _memory_explained(assignment), _log(assignment) as log:
        state = train(task, engine, checkpoints, watch, ray.train.report, log)
    tensors = engine.trainable()
    if dist.get_rank() == 0:
        with assignment.store.commit(assignment.kind, assignment.inputs) as staging:
            task.export(tensors, staging)
            write_json(staging / "training.json", asdict(state))
            if assignment.stage in ("stage1", "stage2"):
                write_card(staging, assignment, task, state, tensors)
    dist.barrier()
    if assignment.store.remote:
        shutil.rmtree(checkpoints.folder, ignore_errors=True)


def _require_storage(assignment: Assignment) -> None:
    """In a folder that this node sees is what the driver made for the run."""
    if not assignment.store.remote and not Path(assignment.checkpoints).is_dir():
        raise not_on_storage(assignment.checkpoints)


@contextlib.contextmanager
def _memory_explained(assignment: Assignment) -> Iterator[None]:
    """Name the knobs where memory ran out; the first step has the longest rows of a while."""
    import torch

    try:
        yield
    except RuntimeError as error:  # on a CPU torch has no error of its own for it
        cpu_is_full = "DefaultCPUAllocator: can't allocate memory" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not cpu_is_full:
            raise
        raise ConfigError(out_of_memory(assignment)) from error


def out_of_memory(assignment: Assignment) -> str:
    """What a user can do about it."""
    stage = assignment.stage
    return (
        f"{stage}: out of memory; lower {stage}.batch_size, set backbone.gradient_checkpointing,"
        " or shard more with compute.zero_stage, compute.workers or compute.offload"
    )


@contextlib.contextmanager
def _log(assignment: Assignment) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Takes scalars of rank 0 as Ray's metrics and for TensorBoard, at a URI once training ends."""
    import torch.distributed as dist
    from tensorboardX import SummaryWriter

    if dist.get_rank():
        yield lambda step, values: None
        return
    store, curves = assignment.store, f"tensorboard/{assignment.name}"
    writer = SummaryWriter(str(store.root / curves), flush_secs=10)
    tags = {"run": assignment.name}

    def log(step: int, values: dict[str, float]) -> None:
        if "seconds" in values:
            values = values | _spent(values["seconds"], assignment.layout)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
            _gauge(name).set(value, tags)

    try:
        yield log
    finally:
        writer.close()
        with contextlib.suppress(CheckpointError):
            store.share(curves)


def _spent(seconds: float, layout: Layout) -> dict[str, float]:
    """GiB, and dollars where the node has labels like those of cluster/gpu.yaml.

    Memory is what this worker had at most: of its GPU, or resident.
    """
    import ray
    import torch

    labels = ray.get_runtime_context().get_node_labels()
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if layout.use_gpu else resident
    found = {"memory_gibibytes": peak / 1024**3}
    if price := labels.get("dollars-per-hour"):
        nodes = layout.workers / max(1.0, float(labels.get("gpus", 1)))
        found["dollars"] = float(price) * nodes * seconds / 3600
    return found


@cache
def _gauge(name: str) -> Any:
    """One of Ray's metrics, which its dashboard and Prometheus show by run."""
    from ray.util.metrics import Gauge

    return Gauge("rsllm_" + re.sub(r"\W+", "_", name), name, tag_keys=("run",))


def _prepare_process(layout: Layout) -> None:
    """Set what torch and DeepSpeed read; DeepSpeed must not be imported yet."""
    import logging

    import torch

    for name in (None, "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["DS_ACCELERATOR"] = "cuda" if layout.use_gpu else "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if layout.threads:
        torch.set_num_threads(layout.threads)


def _engine_settings(assignment: Assignment) -> dict[str, Any]:
    """Recommender and keys are tiny: fp32, and nothing for ZeRO to shard."""
    if assignment.stage in ("recommender", "keys"):
        return {"zero_stage": 0, "bf16": False}
    compute, layout = assignment.experiment.compute, assignment.layout
    bf16 = layout.use_gpu and layout.precision == "bf16"
    return {"zero_stage": compute.zero_stage, "offload": compute.offload, "bf16": bf16}


def build_task(assignment: Assignment) -> Any:
    """What a worker trains; torch.distributed must be initialised."""
    import torch

    from rsllm.data.prepared import PreparedData
    from rsllm.model import tuned
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.train.keys import KeysTask
    from rsllm.train.memory import check_launch
    from rsllm.train.recommender import RecommenderTask
    from rsllm.train.stages import LanguageTask
    from rsllm.train.stream import streamed

    experiment, layout, local = assignment.experiment, assignment.layout, assignment.store.local
    data = PreparedData.open(local(assignment.data))
    if assignment.stage == "recommender":
        folder = assignment.titles
        titles_ID = ItemEmbeddings.load(local(folder)).standardised() if folder else None
        return RecommenderTask(experiment, data, titles_ID, assignment.fold)
    table = assignment.recommender
    items = ItemEmbeddings.load(local(table)) if table else None
    titles_IF = (
        ItemEmbeddings.load(local(assignment.titles)).table_IE if assignment.titles else None
    )
    if assignment.stage == "keys":
        assert titles_IF is not None
        return KeysTask(experiment, data, items, titles_IF)
    stage = experiment.stage1 if assignment.stage == "stage1" else experiment.stage2
    backbone = backbone_here(assignment.backbone, experiment.backbone.source)
    check_launch(experiment, assignment.stage, backbone, data.titles, layout)
    bf16 = layout.precision == "bf16"
    dtype = torch.bfloat16 if layout.use_gpu and bf16 else torch.float32
    model = tuned.build(
        experiment,
        stage.representation,
        backbone,
        data,
        items,
        dtype=dtype,
        form=stage.prompts,
        titles_IF=titles_IF,
        seed=stage.seed,
    )
    if assignment.keys and model.hybrid.catalogue is not None:
        tuned.load_keys(model.hybrid.catalogue.keys, local(assignment.keys))
    if assignment.start:  # whose catalogue scorer, if it has such a one, went on from those keys
        tuned.load(model, local(assignment.start))
    return LanguageTask(
        experiment,
        stage,
        data,
        model,
        name=assignment.stage,
        autocast=bf16 and not layout.use_gpu,
        mixture=[(PreparedData.open(local(path)), weight) for path, weight in assignment.mixture],
        stream=partial(streamed, cpus=layout.encoder_cpus),
    )
