"""One worker of a stage, from imports to the artifact in the store."""

import contextlib
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from rsllm.assets.catalogue import backbone_here
from rsllm.compute.layout import Layout
from rsllm.errors import CheckpointError, ConfigError
from rsllm.store.artifacts import not_on_storage, write_json
from rsllm.terminal import LIVE
from rsllm.train.assignment import Assignment


def work(config: dict[str, Assignment]) -> None:
    """Run under Ray Train, once in every worker: train the stage and commit its artifact.

    Raises:
        ConfigError: this node does not see the storage, or has too little memory.
    """
    assignment = config["assignment"]
    store, stage = assignment.store, assignment.facts
    _require_storage(assignment)
    _prepare_process(assignment.layout)

    import ray.train
    import torch.distributed as dist

    from rsllm.report.card import write_card
    from rsllm.train.checkpoints import Checkpoints
    from rsllm.train.engine import Engine
    from rsllm.train.loop import train
    from rsllm.train.watch import Watch

    compute, layout = assignment.experiment.compute, assignment.layout
    task = build_task(assignment)
    engine = Engine(
        task.objective,
        task.optimization,
        # Recommender and keys are tiny: there is nothing to shard, and fp32 costs nothing.
        zero_stage=compute.zero_stage if stage.is_language_model else 0,
        offload=compute.offload if stage.is_language_model else "none",
        bf16=stage.is_language_model and layout.use_gpu and layout.precision == "bf16",
    )
    checkpoints = Checkpoints(assignment.checkpoints)
    watch = Watch(compute.checkpoint_seconds, compute.timeout_seconds)
    with _memory_explained(assignment), _log(assignment, task.steps) as log:
        state = train(task, engine, checkpoints, watch, ray.train.report, log)
    tensors = engine.trainable()
    if dist.get_rank() == 0:
        with store.commit(stage.kind, assignment.inputs) as staging:
            task.export(tensors, staging)
            write_json(staging / "training.json", asdict(state))
            if stage.is_language_model:
                start = Path(assignment.start).name
                write_card(
                    staging,
                    name=store.name(store.path(stage.kind, assignment.inputs)),
                    experiment=assignment.experiment,
                    stage=assignment.stage,
                    inputs=assignment.inputs,
                    start=f"artifact {start}" if start else "the backbone",
                    data=[(part.data, part.num_users) for part in task.batches.sets],
                    validation=state.curve[-1],
                    num_validated=len(task.validation),
                    num_trained=sum(tensor.numel() for tensor in tensors.values()),
                    seconds=state.seconds,
                    precision=layout.precision,
                )
    dist.barrier()
    if store.remote:
        shutil.rmtree(checkpoints.folder, ignore_errors=True)


def _require_storage(assignment: Assignment) -> None:
    """Refuse a folder without what the driver made in it for the run: it is not the driver's."""
    if not assignment.store.remote and not Path(assignment.checkpoints).is_dir():
        raise not_on_storage(assignment.checkpoints)


def _prepare_process(layout: Layout) -> None:
    """Set what torch and DeepSpeed read; DeepSpeed must not be imported yet."""
    import torch

    for name in (None, "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["DS_ACCELERATOR"] = "cuda" if layout.use_gpu else "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if layout.threads:
        torch.set_num_threads(layout.threads)


def build_task(assignment: Assignment) -> Any:
    """Build what the stage trains; torch.distributed must be initialised.

    Raises:
        ConfigError: a backbone that no prompt fits, or one that the worker's memory cannot train.
    """
    import torch

    from rsllm.data.prepared import PreparedData
    from rsllm.model import tuned
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.train.keys import KeysTask
    from rsllm.train.memory import check_launch
    from rsllm.train.recommender import RecommenderTask
    from rsllm.train.stages import LanguageTask
    from rsllm.train.stream import streamed

    def item_table(folder: str) -> ItemEmbeddings | None:
        return ItemEmbeddings.load(local(folder)) if folder else None

    experiment, layout, local = assignment.experiment, assignment.layout, assignment.store.local
    data, titles = PreparedData.open(local(assignment.data)), item_table(assignment.titles)
    if assignment.stage == "recommender":
        titles_ID = titles.standardised() if titles else None
        return RecommenderTask(experiment, data, titles_ID, assignment.fold)
    items = item_table(assignment.recommender)
    if assignment.stage == "keys":
        assert titles is not None, "keys are made of title vectors"
        return KeysTask(experiment, data, items, titles.table_IE)
    stage = experiment.stage1 if assignment.stage == "stage1" else experiment.stage2
    backbone = backbone_here(assignment.backbone, experiment.backbone.source)
    check_launch(experiment, assignment.stage, backbone, data.titles, layout)
    bf16 = layout.precision == "bf16"
    model = tuned.build(
        experiment,
        stage.representation,
        backbone,
        data,
        items,
        dtype=torch.bfloat16 if layout.use_gpu and bf16 else torch.float32,
        form=stage.prompts,
        titles_IF=titles.table_IE if titles else None,
        seed=stage.seed,
    )
    if assignment.keys and model.hybrid.catalogue is not None:
        tuned.load_keys(model.hybrid.catalogue.keys, local(assignment.keys))
    # After the keys, for the catalogue scorer of an earlier stage went on from those.
    if assignment.start:
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


@contextlib.contextmanager
def _memory_explained(assignment: Assignment) -> Iterator[None]:
    """Name the settings that save memory where it ran out.

    The first steps have the longest rows, so that a run which does not fit fails at once.
    """
    import torch

    try:
        yield
    except RuntimeError as error:  # on a CPU torch has no error of its own for it
        cpu_is_full = "DefaultCPUAllocator: can't allocate memory" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not cpu_is_full:
            raise
        raise ConfigError(out_of_memory(assignment)) from error


def out_of_memory(assignment: Assignment) -> str:
    """Tell a user what can be done about it."""
    stage = assignment.stage
    return (
        f"{stage}: out of memory; lower {stage}.batch_size, set backbone.gradient_checkpointing,"
        " or shard more with compute.zero_stage, compute.workers or compute.offload"
    )


@contextlib.contextmanager
def _log(
    assignment: Assignment, num_steps: int
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yield what takes a step's numbers: rank 0's go to Ray's metrics and to TensorBoard.

    TensorBoard's files reach a URI when training ends. On a terminal there is a bar, too.
    """
    import torch.distributed as dist
    from tensorboardX import SummaryWriter

    if dist.get_rank():
        yield lambda step, values: None
        return
    store, curves = assignment.store, f"tensorboard/{assignment.name}"
    writer = SummaryWriter(str(store.root / curves), flush_secs=10)
    tags = {"run": assignment.name}
    bar = _bar(num_steps) if os.environ.get(LIVE) else None

    def log(step: int, values: dict[str, float]) -> None:
        if "seconds" in values:
            values = values | _spent(values["seconds"], assignment.layout)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
            _gauge(name).set(value, tags)
        if bar:
            bar.n = step
            bar.refresh()

    try:
        yield log
    finally:
        if bar:
            bar.close()
        writer.close()
        with contextlib.suppress(CheckpointError):  # curves are not worth a run
            store.share(curves)


def _bar(num_steps: int) -> Any:
    """A bar that Ray draws on the driver's terminal, by the name of the run, such as a trial's."""
    from ray.experimental.tqdm_ray import tqdm
    from ray.train import get_context

    return tqdm(total=num_steps, desc=get_context().get_experiment_name(), unit=" steps")


def _spent(seconds: float, layout: Layout) -> dict[str, float]:
    """Return GiB, and dollars where the node has labels like those of cluster/gpu.yaml.

    Memory is the most that this worker had: of its GPU, or resident.
    """
    import ray
    import torch

    labels = ray.get_runtime_context().get_node_labels()
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if layout.use_gpu else resident
    spent = {"memory_gibibytes": peak / 1024**3}
    if price := labels.get("dollars-per-hour"):
        nodes = layout.workers / max(1.0, float(labels.get("gpus", 1)))
        spent["dollars"] = float(price) * nodes * seconds / 3600
    return spent


@cache
def _gauge(name: str) -> Any:
    """Return one of Ray's metrics, which its dashboard and Prometheus show by run."""
    from ray.util.metrics import Gauge

    return Gauge("rsllm_" + re.sub(r"\W+", "_", name), name, tag_keys=("run",))
