"""`rsllm plan`: what training or lists for everybody need and take, before they are begun."""

import math
import os
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from timeit import timeit
from typing import Any

from tabulate import tabulate

from rsllm.assets.catalogue import resolve_backbone
from rsllm.compute.layout import Resources, cpu_has_bf16, lay_out
from rsllm.config import Experiment, Offload
from rsllm.errors import ConfigError
from rsllm.model.backbone import check_backbone
from rsllm.recommend.choose import USERS, validated
from rsllm.recommend.load import ROWS_AT_ONCE, open_ranker
from rsllm.recommend.users import THREADS, Task, parquet, room
from rsllm.terminal import as_json
from rsllm.train.memory import GIB, Shape, Step, check_fits, device_memory

EFFICIENCY = 0.46
"""Training's share of the rate of a matrix product (benchmarks/train_step-2-cores.json)."""
K = 10
"""Items of a list, as `rsllm recommend` gives them unless told otherwise."""
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
        if not (math.isfinite(gpus + gibibytes + teraflops + price) and teraflops > 0):
            raise ValueError("numbers, and more than 0 of sustained-teraflops")
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


def plan_lists(model: str, storage: str, *, for_programs: bool = False) -> None:
    """Print what lists for every user of a model's data take on this machine, by what ranks.

    Some of the users are ranked for it, and all others taken to be like them.

    Raises:
        ConfigError: there is no such model, or none that could rank.
    """
    import torch

    torch.set_num_threads(THREADS)
    start = time.perf_counter()
    opened, store = open_ranker(model, storage, "auto")
    opening = time.perf_counter() - start
    pasts, items = [*opened.pasts().items()], len(opened.data.titles)
    sizes = [len(part) for part in Task.of(opened, K).parts(opened)]
    there = Resources(cpus=os.cpu_count() or 1, gpus=torch.cuda.device_count())
    workers, some = min(room(there), len(sizes)), min(ROWS_AT_ONCE, len(pasts))

    def ranked(by: str, users: int) -> tuple[int, float]:
        """The bytes of some users' lists, and the seconds that they took."""
        task, start = Task.of(own := replace(opened, by=by), K), time.perf_counter()
        return len(parquet(task.table(own, dict(pasts[:users])))), time.perf_counter() - start

    rows, each = [], 0.0
    for by in opened.rankers:
        at_once, tables = (sizes[0], 1) if by == "recommender" else (ROWS_AT_ONCE, 2)
        least, reading = ranked(by, 1)  # the first time a language model is read from disk, too
        opening += reading
        size, seconds = ranked(by, some)
        each, grows = seconds / some, (size - least) / max(1, some - 1)
        more = 8 * tables * items * (sizes[0] - some)  # the scores of a whole part
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, as Linux counts
        passes = sum(math.ceil(size / at_once) for size in sizes)
        written = (len(sizes) * (least - grows) + len(pasts) * grows) / 2**20
        total = opening + each * len(pasts) / workers
        rows.append([by, len(pasts), passes, total, (peak + more) / GIB, written])
    header = ["ranker", "users", "passes", "seconds", "GiB per worker", "MiB written"]
    if for_programs:
        lists = [dict(zip(header, row, strict=True)) for row in rows]
        print(as_json({"model": opened.name, "items of a list": K, "rankers": lists}))
        return
    print(
        f"{opened.name}: lists of {K}, {workers} worker(s) of {THREADS} threads, by the rate of"
        f" {some} users here\n{tabulate(rows, header, floatfmt=('', '', '', '.1f', '.2f', '.3f'))}"
    )
    if opened.language and len(rows) > 1 and not opened.exported and not validated(opened, store):
        asked = min(USERS[opened.language.scorer], len(opened.data.rows("validation")))
        print(f"choosing what ranks: {asked} validation users, {asked * each:.0f} s, once")


def plan(
    experiment: Experiment, machine: Machine, title: float, *, for_programs: bool = False
) -> None:
    """Print what the stages need and cost: a table for the one that needs most.

    Args:
        title: tokens of a title, on average.
        for_programs: print JSON.

    Raises:
        ConfigError: a layout or a backbone that cannot be, or a launch that is doomed.
    """
    layout, source = lay_out(experiment.compute, machine.resources), experiment.backbone.source
    backbone = resolve_backbone(source, weights=False)
    check_backbone(backbone, experiment, weights=False)
    stages = {name: getattr(experiment, name) for name in ("stage1", "stage2")}
    shapes = {
        n: Shape.of(experiment, s, layout.workers, title) for n, s in stages.items() if s.steps
    }
    steps = {n: Step(backbone, experiment.backbone, s, layout) for n, s in shapes.items()}
    name, step = max(steps.items(), key=lambda item: item[1].need(2)["total"])
    # `lay_out` refuses ZeRO 0 with a bf16 engine, which trains to other numbers.
    first = 1 if layout.use_gpu and layout.precision == "bf16" else 0
    ways: list[tuple[int, Offload]] = [(stage, "none") for stage in range(first, 4)]
    if layout.use_gpu:
        ways += [(2, "optimizer"), (3, "optimizer"), (3, "parameters")]
    needs = [step.need(*way) for way in ways]
    fits = [need["total"] <= machine.memory for need in needs]
    sizes = [[size / GIB for size in need.values()] for need in needs]
    rows = [[*way, *size, fit] for way, size, fit in zip(ways, sizes, fits, strict=True)]
    shape, whole = step.shape, step.whole
    header = ["ZeRO", "offload", *needs[0], "fits"]
    shown = [[*row[:-1], "yes" if row[-1] else "no"] for row in rows]
    flops = sum(stages[n].samples / s.shape.rows * s.whole["flops"] for n, s in steps.items())
    hours = flops / layout.workers / machine.flops / 3600
    nodes = math.ceil(layout.workers * machine.resources.nodes / max(1, machine.resources.gpus))
    dollars = hours * nodes * machine.price
    if for_programs:
        facts: dict[str, Any] = {
            **whole,
            "precision": layout.precision,
            "stage": name,
            "workers": layout.workers,
        }
        facts |= {"tokens of a row": shape.prompt + shape.branches, "rows": shape.rows}
        facts |= {"operations": flops, "hours": hours, "dollars": dollars}
        facts["memory of a worker, GiB"] = machine.memory / GIB
        facts["GiB per worker"] = [dict(zip(header, row, strict=True)) for row in rows]
        print(as_json(facts))
    else:
        print(
            f"{whole['parameters']:,} parameters, {whole['trained']:,} trained,"
            f" {layout.precision}\n"
            f"{name}, {shape.rows} rows of {shape.prompt + shape.branches} tokens: GiB per worker,"
            f" of {machine.memory / GIB:.1f}\n{tabulate(shown, header, floatfmt='.2f')}\n"
            f"training steps: {flops:.2e} operations, {hours:.1f} h on {layout.workers} workers"
            f" ({dollars:.2f} dollars)"
        )
    compute = experiment.compute
    check_fits(step.need(compute.zero_stage, compute.offload), name, machine.memory)
