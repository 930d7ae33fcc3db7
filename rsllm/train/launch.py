"""One worker of a stage, from imports to the exported artifact."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from rsllm.config import Experiment
from rsllm.errors import ConfigError
from rsllm.plan import Layout

Stage = Literal["recommender", "stage1", "stage2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What the workers of one run are to do; paths are on storage that all of them see."""

    stage: Stage
    experiment: Experiment
    layout: Layout
    data: str
    backbone: str = ""
    titles: str = ""
    """Folder of the title vectors that stand for the items of a recommender; empty: ids do."""
    fold: int | None = None
    """The part of the training users that a cross-fitted recommender does not see."""
    recommender: str = ""
    """Folder of the item table that fills the slots; empty for prompts without slots."""
    mixture: Sequence[tuple[str, float]] = ()
    """Folders and weights of the further data sets of stage 1."""
    start: str = ""
    """Folder of the adapter to continue from; empty starts fresh."""
    checkpoints: str
    curves: str
    """Folder of TensorBoard's events."""
    export: str


def work(config: dict[str, Assignment]) -> None:
    """What each worker runs under Ray Train.

    Raises:
        ConfigError: this node does not see the storage.
    """
    assignment = config["assignment"]
    _require_storage(Path(assignment.export))
    _prepare_process(assignment.layout)

    import ray.train
    import torch.distributed as dist

    from rsllm.runs import write_json
    from rsllm.train.checkpoints import Checkpoints
    from rsllm.train.engine import Engine
    from rsllm.train.loop import train
    from rsllm.train.watch import Watch

    compute = assignment.experiment.compute
    task = build_task(assignment)
    engine = Engine(task.objective, task.optimization, **_engine_settings(assignment))
    checkpoints = Checkpoints(Path(assignment.checkpoints))
    watch = Watch(compute.checkpoint_seconds, compute.timeout_seconds)
    with _memory_explained(assignment):
        state = train(task, engine, checkpoints, watch, ray.train.report, _log(assignment))
    tensors = engine.trainable()
    if dist.get_rank() == 0:
        task.export(tensors, Path(assignment.export))
        write_json(Path(assignment.export) / "training.json", asdict(state))
    dist.barrier()


def _require_storage(export: Path) -> None:
    if not export.is_dir():
        raise ConfigError(
            f"{export.parent} is not on storage that {platform.node()} sees; give --storage a"
            " folder that every node of the cluster mounts"
        )


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


def _log(assignment: Assignment) -> Any:
    """Scalars of rank 0, for TensorBoard and as Ray's metrics."""
    import torch.distributed as dist
    from tensorboardX import SummaryWriter

    if dist.get_rank():
        return lambda step, values: None
    writer = SummaryWriter(assignment.curves, flush_secs=10)
    tags = {"run": Path(assignment.checkpoints).name}

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
            _gauge(name).set(value, tags)

    return log


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
    """The recommender is tiny: fp32, and nothing for ZeRO to shard."""
    if assignment.stage == "recommender":
        return {"zero_stage": 0, "bf16": False}
    compute, layout = assignment.experiment.compute, assignment.layout
    return {
        "zero_stage": compute.zero_stage,
        "offload": compute.offload,
        "bf16": layout.use_gpu and layout.precision == "bf16",
    }


def build_task(assignment: Assignment) -> Any:
    """What a worker trains; torch.distributed must be initialised."""
    import torch

    from rsllm.data.prepared import PreparedData
    from rsllm.model import tuned
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.train.recommender import RecommenderTask
    from rsllm.train.stages import LanguageTask
    from rsllm.train.stream import streamed

    experiment, layout = assignment.experiment, assignment.layout
    data = PreparedData.open(Path(assignment.data))
    if assignment.stage == "recommender":
        titles = assignment.titles
        titles_ID = ItemEmbeddings.load(Path(titles)).standardised() if titles else None
        return RecommenderTask(experiment, data, titles_ID, assignment.fold)
    stage = experiment.stage1 if assignment.stage == "stage1" else experiment.stage2
    bf16 = layout.precision == "bf16"
    model = tuned.build(
        experiment,
        stage.representation,
        assignment.backbone,
        data,
        ItemEmbeddings.load(Path(assignment.recommender)) if assignment.recommender else None,
        dtype=torch.bfloat16 if layout.use_gpu and bf16 else torch.float32,
        seed=stage.seed,
    )
    if assignment.start:
        tuned.load(model, Path(assignment.start))
    return LanguageTask(
        experiment,
        stage,
        data,
        model,
        name=assignment.stage,
        autocast=bf16 and not layout.use_gpu,
        mixture=[(PreparedData.open(Path(path)), weight) for path, weight in assignment.mixture],
        stream=partial(streamed, cpus=layout.encoder_cpus),
    )
