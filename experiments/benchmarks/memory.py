"""Does `rsllm plan` know what a training step needs? Its estimate against what the kernel saw.

Each configuration takes real steps of stage 2 through DeepSpeed in a process of its own, in the
environment that Ray gives to workers, on the longest batches among the first. `VmHWM` is the most
that the process ever held. The plan sees the backbone's config and the sizes of those batches;
`process` is what libraries, tokenizer and data take, measured in each process before there is a
model. Ratios are estimate / measured.

    python experiments/benchmarks/memory.py --out results.json

Cost: about 10 min on 2 cores, 6 GB of memory. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rsllm import Experiment, Pipeline, replace_in
from rsllm.cli import run_script
from rsllm.cluster import WORKER_ENVIRONMENT
from rsllm.runs import provenance, write_json

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, checkpointing": {"backbone.gradient_checkpointing": True},
    "LoRA, bf16 autocast": {"compute.precision": "bf16"},
    "LoRA, all branches": {"stage2.loss.gamma": 0.5, "stage2.batch_size": 4},
    "full tuning": {"backbone.tuning": "full", "stage2.batch_size": 2},
}
ROUNDS, POOLED = 3, 32
ZERO_STAGE = 2


def resident(key: str) -> float:
    """Bytes of this process: now (`VmRSS`) or at most so far (`VmHWM`)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def measure(name: str, storage: Path) -> dict[str, Any]:
    """Peak of a few steps on the longest of the first batches, and the plan for their shape."""
    import torch
    import torch.distributed as dist

    from rsllm.data.prepared import PreparedData
    from rsllm.model import tuned
    from rsllm.model.backbone import load_tokenizer
    from rsllm.prompts.encode import PromptEncoder
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.train import stages
    from rsllm.train.engine import Engine

    experiment = replace_in(Experiment(), CONFIGURATIONS[name])
    pipeline = Pipeline(experiment, storage)
    data, backbone = PreparedData.open(pipeline.prepare()), pipeline.backbone
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    folder = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    PromptEncoder(load_tokenizer(backbone), data.titles, experiment.prompt, "unified", "movie")
    process = resident("VmRSS")
    table_IE = torch.randn(len(data.titles), experiment.recommender.width)
    items = ItemEmbeddings(table_IE, source="random")
    model = tuned.build(experiment, "unified", backbone, data, items, dtype=torch.float32)
    bf16 = experiment.compute.precision == "bf16"
    task = stages.LanguageTask(experiment, experiment.stage2, data, model, name=name, autocast=bf16)
    engine = Engine(task.objective, task.optimization, zero_stage=ZERO_STAGE, bf16=False)
    batches = [task.batches(step)[0] for step in range(POOLED)]
    batches = sorted(batches, key=lambda batch: batch.ids_BT.shape[1])[-ROUNDS:]
    for step, batch in enumerate(batches):
        engine.step([batch], step)
    measured = resident("VmHWM")
    return {"process": process, "measured": measured} | plan(experiment, backbone, batches[-1])


def plan(experiment: Experiment, backbone: str, batch: Any) -> dict[str, Any]:
    """The parts that the plan names for a batch of these sizes, without those of the process."""
    from rsllm.plan import Resources, lay_out
    from rsllm.train.memory import Shape, Step

    rows, width = batch.ids_BT.shape
    prompt = int((batch.branch_BT == 0).sum(1).max())
    alone, ranked = batch.targets.ids_GL.shape[1], batch.parallel
    shape = Shape(rows=rows, prompt=prompt, branches=width - prompt, alone=alone, parallel=ranked)
    layout = lay_out(experiment.compute, Resources(cpus=1, gpus=0))
    need = Step(backbone, experiment.backbone, shape, layout).need(ZERO_STAGE)
    return {"tokens": rows * width, "parts": {k: need[k] for k in need if k != "process"}}


def main() -> None:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.storage)))
        return
    Pipeline(Experiment(), arguments.storage).prepare()
    found = {name: run(name, arguments.storage) for name in CONFIGURATIONS}
    rows = [
        [name, one["tokens"], one["planned"] / 2**30, one["measured"] / 2**30, one["ratio"]]
        for name, one in found.items()
    ]
    print(
        tabulate(rows, ["step", "tokens", "planned GiB", "measured GiB", "ratio"], floatfmt=".3f")
    )
    if arguments.out:
        facts = {"steps": ROUNDS, "environment": WORKER_ENVIRONMENT, "provenance": provenance()}
        write_json(arguments.out, {"bytes": found, **facts})


def run(name: str, storage: Path) -> dict[str, Any]:
    """One configuration in a process of its own."""
    command = [sys.executable, __file__, "--storage", str(storage), "--only", name]
    environment = os.environ | WORKER_ENVIRONMENT
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["parts"].pop("total")
    found["planned"] = found["process"] + sum(found["parts"].values())
    return found | {"ratio": found["planned"] / found["measured"]}


if __name__ == "__main__":
    run_script(main)
