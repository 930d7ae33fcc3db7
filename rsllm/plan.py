"""`rsllm plan`: what training needs, how long it takes and costs, before anything is launched."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit
from typing import Any

from rsllm.assets.catalogue import resolve_backbone
from rsllm.compute.layout import Resources, cpu_has_bf16, lay_out
from rsllm.config import Experiment, Offload
from rsllm.errors import ConfigError
from rsllm.model.backbone import check_backbone
from rsllm.train.memory import GIB, Shape, Step, check_fits, device_memory

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


def this_machine() -> Machine:
    """The GPUs that this process sees, or this machine's cores; a matrix product says how fast."""
    import torch

    gpus = torch.cuda.device_count()
    total = Resources(cpus=os.cpu_count() or 1, gpus=gpus, bf16=cpu_has_bf16())
    a = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda" if gpus else "cpu")
    seconds = min(timeit(lambda: float((a @ a)[0, 0]), number=1) for _ in range(4))
    flops = EFFICIENCY * 2 * 2048**3 / seconds
    return Machine(resources=total, memory=device_memory(gpus > 0), flops=flops)


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
    lowest = 1 if layout.use_gpu and layout.precision == "bf16" else 0  # `lay_out` refuses ZeRO 0
    ways: list[tuple[int, Offload]] = [(stage, "none") for stage in range(lowest, 4)]
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
