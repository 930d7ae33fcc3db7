"""Run a stage under Ray Train: the worker function and its `TorchTrainer`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rsllm.config import Experiment, StageConfig
from rsllm.errors import ConfigError, RsllmError, TrainingError
from rsllm.plan import Layout

Stage = Literal["recommender", "stage1", "stage2"]
LETTERS_PER_TOKEN = 5
"""Of titles; more than tokenizers reach, so that no launch is refused that would work."""
MAX_FAILURES = 1
"""Restarts after a worker died; each continues from the last checkpoint."""


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


def run(assignment: Assignment, *, name: str, storage: Path, callbacks: Sequence[Any] = ()) -> None:
    """Train one stage with Ray Train and wait for it; the artifact is in `assignment.export`.

    Raises:
        TrainingError: a worker failed for good.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    layout = assignment.layout
    trainer = TorchTrainer(
        _work,
        train_loop_config={"assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=layout.workers,
            use_gpu=layout.use_gpu,
            resources_per_worker={"CPU": layout.cpus_per_worker}
            | ({"GPU": 1} if layout.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    # Ray Train's handler would end the process with exit code 0 and outlive the run.
    trainer._register_sigint_handler = lambda controller: None
    try:
        trainer.fit()
    except Exception as error:
        raise _explained(error, assignment.stage) from error


def _explained(error: Exception, stage: Stage) -> RsllmError:
    """The workers' own error, if it is one of ours; otherwise what Ray Train says."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, RsllmError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    first = str(next(iter(failures.values()))).strip().splitlines()
    return TrainingError(f"{stage} failed: {first[-1] if first else type(error).__name__}")


def _work(config: dict[str, Assignment]) -> None:
    """One worker, from imports to the exported artifact."""
    assignment = config["assignment"]
    _prepare_process(assignment.layout)

    import ray.train
    import torch.distributed as dist

    from rsllm.runs import write_json
    from rsllm.train.checkpoints import Checkpoints
    from rsllm.train.engine import Engine
    from rsllm.train.loop import train

    task = _task(assignment)
    engine = Engine(task.objective, task.optimization, **_engine_settings(assignment))
    checkpoints = Checkpoints(Path(assignment.checkpoints))
    state = train(task, engine, checkpoints, ray.train.report, _log(assignment))
    tensors = engine.trainable()
    if dist.get_rank() == 0:
        task.export(tensors, Path(assignment.export))
        write_json(Path(assignment.export) / "training.json", asdict(state))
    dist.barrier()


def _log(assignment: Assignment) -> Any:
    """Scalars of rank 0, for TensorBoard."""
    import torch.distributed as dist
    from tensorboardX import SummaryWriter

    if dist.get_rank():
        return lambda step, values: None
    writer = SummaryWriter(assignment.curves, flush_secs=10)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log


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
    layout = assignment.layout
    return {
        "zero_stage": assignment.experiment.compute.zero_stage,
        "bf16": layout.use_gpu and layout.precision == "bf16",
    }


def _task(assignment: Assignment) -> Any:
    import torch

    from rsllm.data.prepared import PreparedData
    from rsllm.model import tuned
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.train.recommender import RecommenderTask
    from rsllm.train.stages import LanguageTask

    experiment, layout = assignment.experiment, assignment.layout
    data = PreparedData.open(Path(assignment.data))
    if assignment.stage == "recommender":
        titles = assignment.titles
        titles_ID = ItemEmbeddings.load(Path(titles)).standardised() if titles else None
        return RecommenderTask(experiment, data, titles_ID, assignment.fold)
    stage = experiment.stage1 if assignment.stage == "stage1" else experiment.stage2
    _refuse_if_doomed(assignment, stage, data.titles)
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
    )


def _refuse_if_doomed(assignment: Assignment, stage: StageConfig, titles: Sequence[str]) -> None:
    """Before weights are loaded; what cannot be planned for is let through."""
    from rsllm.train.forecast import check_fits, device_memory
    from rsllm.train.memory import Shape, Step

    experiment, layout = assignment.experiment, assignment.layout
    title = sum(map(len, titles)) / len(titles) / LETTERS_PER_TOKEN
    try:
        shape = Shape.of(experiment, stage, layout.workers, title)
        step = Step(assignment.backbone, experiment.backbone, shape, layout)
    except ConfigError:
        return
    need = step.need(experiment.compute.zero_stage)
    check_fits(need, assignment.stage, device_memory(layout.use_gpu))
