"""`rsllm plan`: what training needs, how long it takes and costs, before anything is launched."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from timeit import timeit
from typing import Any

from rsllm.assets import resolve_backbone
from rsllm.config import Experiment, Offload
from rsllm.errors import ConfigError
from rsllm.model.backbone import check_backbone, load_tokenizer
from rsllm.plan import Layout, Resources, cpu_has_bf16, lay_out
from rsllm.train.memory import GIB, Shape, Sizes, Step

CERTAINLY = 1.15
"""A launch is refused where it needs more than the memory by more than an estimate's error."""
EFFICIENCY = 0.46
"""Training's share of the rate of a matrix product (benchmarks/train_step-2-cores.json)."""
LABELS = ("gpus", "gpu-gibibytes", "sustained-teraflops", "dollars-per-hour")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Equal nodes, and what they cost."""

    resources: Resources
    memory: float
    """Bytes of a GPU, or of a node without any."""
    flops: float
    """Operations per second that a GPU sustains, or a node without any."""
    price: float = 0.0
    """Dollars per hour and node."""


def read_cluster(path: Path) -> Machine:
    """The workers of a Ray cluster file, whose labels say what Ray has no word for.

    Raises:
        ConfigError: no such file, or a worker type without these labels.
    """
    import yaml

    try:
        cluster = yaml.safe_load(path.read_text())
        types: dict[str, Any] = cluster["available_node_types"]
        worker = next(t for name, t in types.items() if name != cluster["head_node_type"])
        gpus, gibibytes, teraflops, price = (float(worker["labels"][label]) for label in LABELS)
        nodes = int(worker["max_workers"])
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, StopIteration) as error:
        raise ConfigError(
            f"{path} does not say what its workers are ({type(error).__name__}: {error}); give the"
            f" worker type max_workers and the labels {', '.join(LABELS)}, as cluster/gpu.yaml does"
        ) from error
    total = Resources(cpus=8 * gpus * nodes, gpus=gpus * nodes, nodes=nodes)
    return Machine(resources=total, memory=gibibytes * GIB, flops=teraflops * 1e12, price=price)


def device_memory(gpu: bool) -> float:
    """Bytes of a GPU that this process sees, or of this machine."""
    import torch

    if gpu:
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"))


def this_machine() -> Machine:
    """The GPUs that this process sees, or this machine's cores; a matrix product says how fast."""
    import torch

    gpus = torch.cuda.device_count()
    total = Resources(cpus=os.cpu_count() or 1, gpus=gpus, bf16=cpu_has_bf16())
    a = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda" if gpus else "cpu")
    seconds = min(timeit(lambda: float((a @ a)[0, 0]), number=1) for _ in range(4))
    flops = EFFICIENCY * 2 * 2048**3 / seconds
    return Machine(resources=total, memory=device_memory(gpus > 0), flops=flops)


def check_fits(need: Sizes, name: str, memory: float) -> None:
    """Refuse to launch a stage that is doomed.

    Args:
        need: of its step, under the ZeRO stage and offload of the run.
        name: of the stage.
        memory: bytes that a worker can have at most.

    Raises:
        ConfigError: a step needs clearly more; the message names the settings that save memory.
    """
    *parts, total = need
    if need[total] > CERTAINLY * memory:
        raise ConfigError(
            f"{name} needs {need[total] / GIB:.1f} GiB per worker, most of it"
            f" {max(parts, key=lambda part: need[part])}, and there are {memory / GIB:.1f}; try"
            f" more {name}.accumulation or a smaller {name}.batch_size,"
            " backbone.gradient_checkpointing=true, a higher compute.zero_stage over more"
            " compute.workers, compute.offload, or a smaller backbone"
        )


def check_launch(
    experiment: Experiment, name: str, backbone: str | Path, titles: Sequence[str], layout: Layout
) -> None:
    """Refuse a stage that the memory of this worker cannot hold, before any weight is read.

    Raises:
        ConfigError: it cannot.
    """
    try:
        ids = load_tokenizer(backbone)(list(titles[:1000]), add_special_tokens=False).input_ids
        title, stage = fmean(map(len, ids)), getattr(experiment, name)
        shape = Shape.of(experiment, stage, layout.workers, title)
        step = Step(backbone, experiment.backbone, shape, layout)
    except ConfigError:
        return  # what cannot be planned may run all the same, or says more of itself
    compute, here = experiment.compute, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    memory = device_memory(layout.use_gpu) / (1 if layout.use_gpu else here)
    check_fits(step.need(compute.zero_stage, compute.offload), name, memory)


def plan(experiment: Experiment, machine: Machine, title: float) -> None:
    """Print what the stages need and cost: a table for the one that needs most.

    Args:
        title: tokens of a title, on average.

    Raises:
        ConfigError: a layout or a backbone that cannot be, or a launch that is doomed.
    """
    from tabulate import tabulate

    layout, source = lay_out(experiment.compute, machine.resources), experiment.backbone.source
    backbone = resolve_backbone(source, weights=False)
    check_backbone(backbone, experiment, weights=False)
    stages = {name: getattr(experiment, name) for name in ("stage1", "stage2")}
    shapes = {
        n: Shape.of(experiment, s, layout.workers, title) for n, s in stages.items() if s.steps
    }
    steps = {n: Step(backbone, experiment.backbone, s, layout) for n, s in shapes.items()}
    name, step = max(steps.items(), key=lambda item: item[1].need(2)["total"])
    zero = range(layout.use_gpu and layout.precision == "bf16", 4)
    ways: list[tuple[int, Offload]] = [(stage, "none") for stage in zero]
    if layout.use_gpu:
        ways += [(2, "optimizer"), (3, "optimizer"), (3, "parameters")]
    needs = [step.need(*way) for way in ways]
    fits = ["no" if need["total"] > machine.memory else "yes" for need in needs]
    sizes = [[size / GIB for size in need.values()] for need in needs]
    rows = [[*way, *size, fit] for way, size, fit in zip(ways, sizes, fits, strict=True)]
    shape, whole = step.shape, step.whole
    print(
        f"{whole['parameters']:,} parameters, {whole['trained']:,} trained, {layout.precision}\n"
        f"{name}, {shape.rows} rows of {shape.prompt + shape.branches} tokens: GiB per worker, of"
        f" {machine.memory / GIB:.1f}\n"
        + tabulate(rows, ["ZeRO", "offload", *needs[0], "fits"], floatfmt=".2f")
    )
    flops = sum(stages[n].samples / s.shape.rows * s.whole["flops"] for n, s in steps.items())
    hours = flops / layout.workers / machine.flops / 3600
    nodes = math.ceil(layout.workers * machine.resources.nodes / max(1, machine.resources.gpus))
    print(
        f"training steps: {flops:.2e} operations, {hours:.1f} h on {layout.workers} workers"
        f" ({hours * nodes * machine.price:.2f} dollars)"
    )
    compute = experiment.compute
    check_fits(step.need(compute.zero_stage, compute.offload), name, machine.memory)
