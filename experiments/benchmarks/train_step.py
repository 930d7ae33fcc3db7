"""What does a training step cost, against the obvious implementation of the same loss?

The reference is what one writes first, as LLaRA does: random rows padded to the longest,
transformers' own loss with logits at every position, its SDPA attention, peft's own dropout on
LoRA's input, AdamW. Ours computes logits only where there are labels, on batches of similar length,
with one cheap mask for all layers that read a tensor and attention by plain products, through
DeepSpeed. Both compute the next-item loss of RSLLM's unified prompts with LoRA and a dropout of
0.1, in turn in one process; times are medians over the rounds, by the clock and by the processor,
which other work on the machine disturbs less. Peak memory is measured in a process of its own. The
arithmetic rate stands beside that of a 2048 x 2048 matrix product.

    python experiments/benchmarks/train_step.py --out results.json

Cost: about 6 min on 2 cores. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from tabulate import tabulate
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from rsllm import Experiment, Pipeline, replace_in
from rsllm.cli import run_script
from rsllm.data.prepared import PreparedData
from rsllm.model import tuned
from rsllm.prompts.collate import PADDING, Batch
from rsllm.prompts.encode import NO_ITEM
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import provenance, write_json
from rsllm.train import batches, stages

DROPOUT = 0.1
PLAIN = {"stage2.loss.alpha": 0.0, "stage2.loss.beta": 0.0, "stage2.loss.gamma": 0.0}
PLAIN["backbone.lora_dropout"] = DROPOUT
VARIANTS = ("rsllm", "rsllm, dropout and attention as usual", "obvious")
ROUNDS, WARM_UP, GOAL = 5, 1, 2.0
MATRIX_PRODUCTS = ("mm", "linear", "attention", "convolution")


def build(name: str, data: PreparedData, backbone: str) -> tuple[Any, Callable[[int], Any]]:
    """The task, and one optimizer step of a variant."""
    experiment = replace_in(Experiment(), PLAIN)
    generator = torch.Generator().manual_seed(0)
    table_IE = torch.randn(len(data.titles), experiment.recommender.width, generator=generator)
    model = tuned.build(
        experiment,
        "unified",
        backbone,
        data,
        ItemEmbeddings(table_IE, source="random"),
        dtype=torch.float32,
    )
    stage = experiment.stage2
    task = stages.LanguageTask(experiment, stage, data, model, name=name, autocast=True)
    if name != "rsllm":
        _as_usual(model.hybrid)
    return task, _obvious(task) if name == "obvious" else _ours(task)


def _ours(task: Any) -> Callable[[int], Any]:
    from rsllm.train.engine import Engine

    engine = Engine(task.objective, task.optimization, zero_stage=2, bf16=False)
    return lambda step: engine.step(task.batches(step), step)


def _obvious(task: Any) -> Callable[[int], Any]:
    """Logits at every position, from transformers' own forward pass and loss."""
    model = task.model.hybrid
    groups = [{"params": g.parameters, "lr": g.learning_rate} for g in task.optimization.groups]
    optimizer = torch.optim.AdamW(groups)

    def step(number: int) -> float:
        (batch,) = task.batches(number)
        ids_BT = F.pad(batch.ids_BT, (0, 1), value=task.model.encoder.terminator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.llm(
                inputs_embeds=model.embed(ids_BT, F.pad(batch.item_BT, (0, 1), value=NO_ITEM)),
                attention_mask=F.pad((batch.branch_BT != PADDING).long(), (1, 0), value=1),
                labels=_labels(batch),
            ).loss
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def _as_usual(model: Any) -> None:
    """Give a model SDPA attention, and the dropout that peft makes."""
    model.backbone.set_attn_implementation("sdpa")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = True
            layer.lora_dropout["default"] = torch.nn.Dropout(DROPOUT)


def _labels(batch: Batch) -> torch.Tensor:
    """The answers' tokens, each after the state that predicts it, -100 elsewhere. [B, T + 1]."""
    num_rows, width = batch.ids_BT.shape
    label_BT = torch.full((num_rows, width + 1), -100)
    state_N = batch.state_U[batch.label_state_N]
    label_BT[state_N // width, state_N % width + 1] = batch.label_N
    return label_BT


@contextmanager
def random_batches(wanted: bool) -> Iterator[None]:
    """Rows as they come, without sorting by length."""
    before, batches.POOL_STEPS = batches.POOL_STEPS, 1 if wanted else batches.POOL_STEPS
    yield
    batches.POOL_STEPS = before


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations per second of a 2048 x 2048 matrix product, the best of a few."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    return 2 * 2048**3 / min(timeit(lambda: a @ b, number=1) for _ in range(8))


def measure(data: PreparedData, backbone: str, rounds: int) -> dict[str, Any]:
    """Median seconds per row of every variant over interleaved rounds, and ratios of them."""
    steps = {}
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    taken = {clock: {name: list[float]() for name in VARIANTS} for clock in clocks}
    tokens = {name: list[float]() for name in VARIANTS}
    for name in VARIANTS:
        steps[name] = build(name, data, backbone)
    for number in range(WARM_UP + rounds):
        for name, (task, step) in steps.items():
            unsorted = name == "obvious"
            with random_batches(unsorted):
                (batch,) = task.batches(number)
                start = {clock: read() for clock, read in clocks.items()}
                step(number)
                end = {clock: read() for clock, read in clocks.items()}
            if number >= WARM_UP:
                for clock in clocks:
                    taken[clock][name].append(end[clock] - start[clock])
                tokens[name].append(int((batch.branch_BT != PADDING).sum()))
    per_token = {
        clock: {
            name: statistics.median(s / t for s, t in zip(of[name], tokens[name], strict=True))
            for name in VARIANTS
        }
        for clock, of in taken.items()
    }
    task, step = steps["rsllm"]
    flops = _flops(lambda: step(WARM_UP + rounds))
    rate = flops / statistics.median(taken["seconds"]["rsllm"])
    ceiling = matrix_rate(torch.bfloat16)
    return {
        "microseconds_per_token": {n: 1e6 * value for n, value in per_token["seconds"].items()},
        "times_as_fast_as_obvious": {
            clock: {name: of["obvious"] / value for name, value in of.items()}
            for clock, of in per_token.items()
        },
        "goal": GOAL,
        "padding": _padding(task),
        "operations_per_second": rate,
        "matrix_product_per_second": ceiling,
        "matrix_product_per_second_fp32": matrix_rate(torch.float32),
        "mfu": rate / ceiling,
        "share_of_time": _shares(lambda: step(WARM_UP + rounds + 1)),
    }


def _padding(task: Any) -> dict[str, float]:
    """Share of padding, in order of length and at random."""
    found = {}
    for name, unsorted in (("by length", False), ("random", True)):
        batches._pool.cache_clear()
        with random_batches(unsorted):
            branch_BT = [task.batches(step)[0].branch_BT for step in range(batches.POOL_STEPS * 4)]
        padding = sum(int((b == PADDING).sum()) for b in branch_BT)
        found[name] = padding / sum(b.numel() for b in branch_BT)
    batches._pool.cache_clear()
    return found


def _flops(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _shares(work: Callable[[], Any]) -> dict[str, float]:
    """Where the time of a step goes, by operator: the largest ones."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    events = [(e.key, e.self_cpu_time_total) for e in profiler.key_averages()]
    total = sum(t for _, t in events)
    product = sum(t for name, t in events if any(word in name for word in MATRIX_PRODUCTS))
    others = sorted((e for e in events if not any(w in e[0] for w in MATRIX_PRODUCTS)), key=_time)
    return {"matrix products": product / total} | {n: t / total for n, t in others[-6:][::-1]}


def _time(event: tuple[str, float]) -> float:
    return event[1]


def own_peak() -> float:
    """Gigabytes; the kernel's figure for this program alone, unlike that of `getrusage`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def peak_memory(name: str, arguments: argparse.Namespace) -> float:
    """Gigabytes that a process of its own holds at most over a few steps."""
    command = [sys.executable, __file__, "--storage", str(arguments.storage), "--memory", name]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out.splitlines()[-1]))


def main() -> None:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pipeline = Pipeline(Experiment(), arguments.storage)
    data, backbone = PreparedData.open(pipeline.prepare()), pipeline.backbone
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        if arguments.memory:
            _, step = build(arguments.memory, data, backbone)
            with random_batches(arguments.memory == "obvious"):
                for number in range(3):
                    step(number)
            print(own_peak())
            return
        found = measure(data, backbone, arguments.rounds)
        dist.destroy_process_group()
    found["peak_gigabytes"] = {name: peak_memory(name, arguments) for name in VARIANTS}
    found |= {
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    if arguments.out:
        write_json(arguments.out, found)
    faster = found["times_as_fast_as_obvious"]
    columns = (found["microseconds_per_token"], *faster.values(), found["peak_gigabytes"])
    rows = [[name, *(column[name] for column in columns)] for name in VARIANTS]
    heads = ["step", "us per token", "times as fast", "by processor time", "peak GB"]
    print(tabulate(rows, heads, floatfmt=".2f"))
    print(f"MFU {found['mfu']:.2f}; {found['share_of_time']}; padding {found['padding']}")


if __name__ == "__main__":
    run_script(main)
