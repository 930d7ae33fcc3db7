"""Does `rsllm plan` know what a training step needs? Its estimate against what the kernel saw.

Each configuration takes real steps of stage 2 through DeepSpeed, in processes of their own, on the
longest of the first batches. The plan sees the backbone's config and the sizes of those batches.
`process` is what libraries, tokenizer and data take, measured in each process after a step of a
tiny model. `VmHWM`, the most that a process ever held, is measured twice:

    allocated   every large tensor has a mapping of its own, so that nothing but it is resident
    resident    with an allocator that is told to join what is freed, and still has holes

Ratios are estimate / measured.

    python experiments/benchmarks/memory.py --out results.json

Cost: about 15 min on 2 cores, 6 GB of memory. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import gc
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
from rsllm.store.artifacts import provenance, write_json

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, checkpointing": {"backbone.gradient_checkpointing": True},
    "LoRA, bf16 autocast": {"compute.precision": "bf16"},
    "LoRA, all branches": {"stage2.loss.gamma": 0.5, "stage2.batch_size": 4},
    "full tuning": {"backbone.tuning": "full", "stage2.batch_size": 2},
}
ENVIRONMENTS = {
    "allocated": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "resident": {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"},
}
COLUMNS = (
    *("tokens", "allocated_planned", "allocated_measured", "allocated_ratio"),
    *("resident_measured", "resident_ratio"),
)
STEPS, POOLED = 2, 32
ZERO_STAGE = 2


def resident(key: str) -> float:
    """Bytes of this process: now (`VmRSS`) or at most so far (`VmHWM`)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def measure(name: str, storage: Path) -> dict[str, Any]:
    """Peak of a few steps on the longest of the first batches, and the plan for their shape."""
    import torch.distributed as dist

    from rsllm.data.prepared import PreparedData

    experiment = replace_in(Experiment(), CONFIGURATIONS[name])
    pipeline = Pipeline(experiment, storage)
    data, backbone = PreparedData.open(pipeline.prepare()), pipeline.backbone
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        init = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
        train(experiment, data, tiny(Path(folder), backbone))
        gc.collect()
        process = resident("VmRSS")
        batch = train(experiment, data, backbone)
        measured = resident("VmHWM")
        dist.destroy_process_group()
    return {"process": process, "measured": measured} | plan(experiment, backbone, batch)


def tiny(folder: Path, backbone: str) -> str:
    """A backbone of one narrow layer with the same tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rsllm.model.backbone import load_tokenizer

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.from_pretrained(backbone, trust_remote_code=False, **sizes, **heads)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(
        folder / "tiny"
    )
    load_tokenizer(backbone).save_pretrained(folder / "tiny")
    return str(folder / "tiny")


def train(experiment: Experiment, data: Any, backbone: str) -> Any:
    """A few steps on the longest batches; returns the longest."""
    import torch

    from rsllm.model import tuned
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.train import stages
    from rsllm.train.engine import Engine

    items = ItemEmbeddings(torch.randn(len(data.titles), 64), source="random")
    model = tuned.build(experiment, "unified", backbone, data, items, dtype=torch.float32)
    bf16 = experiment.compute.precision == "bf16"
    stage = experiment.stage2
    task = stages.LanguageTask(experiment, stage, data, model, name="memory", autocast=bf16)
    engine = Engine(task.objective, task.optimization, zero_stage=ZERO_STAGE, bf16=False)
    batches = [task.batches(step)[0] for step in range(POOLED)]
    batches = sorted(batches, key=lambda batch: batch.ids_BT.shape[1])[-STEPS:]
    for step, batch in enumerate(batches):
        engine.step([batch], step)
    return batches[-1]


def plan(experiment: Experiment, backbone: str, batch: Any) -> dict[str, Any]:
    """The parts that the plan names for a batch of these sizes, without those of the process."""
    from rsllm.compute.layout import Resources, lay_out
    from rsllm.train.memory import Shape, Step

    rows, width = batch.ids_BT.shape
    prompt = int((batch.branch_BT == 0).sum(1).max())
    alone, ranked = batch.targets.ids_GL.shape[1], batch.parallel
    shape = Shape(rows=rows, prompt=prompt, branches=width - prompt, alone=alone, parallel=ranked)
    layout = lay_out(experiment.compute, Resources(cpus=1, gpus=0))
    need = Step(backbone, experiment.backbone, shape, layout).need(ZERO_STAGE)
    return {
        "tokens": rows * width,
        "parts": {k: need[k] for k in need if k not in ("process", "total")},
    }


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
    found = {name: compare(name, arguments.storage) for name in CONFIGURATIONS}
    rows = [[name, *(found[name][key] for key in COLUMNS)] for name in CONFIGURATIONS]
    print(tabulate(rows, ["step", *COLUMNS], floatfmt=".2f"))
    if arguments.out:
        facts = {"steps": STEPS, "environments": ENVIRONMENTS, "provenance": provenance()}
        write_json(arguments.out, {"configurations": found, **facts})


def compare(name: str, storage: Path) -> dict[str, Any]:
    """One configuration in both environments. GiB."""
    found: dict[str, Any] = {}
    for kind, environment in ENVIRONMENTS.items():
        command = [sys.executable, __file__, "--storage", str(storage), "--only", name]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        one = json.loads(done.stdout.splitlines()[-1])
        parts = {"process": one["process"]} | one["parts"]
        planned = sum(parts.values())
        found |= {
            "tokens": one["tokens"],
            f"{kind}_parts": {k: v / 2**30 for k, v in parts.items()},
        }
        found |= {f"{kind}_planned": planned / 2**30, f"{kind}_measured": one["measured"] / 2**30}
        found[f"{kind}_ratio"] = planned / one["measured"]
        print(f"{name}, {kind}: {planned / one['measured']:.3f}", flush=True)
    return found


if __name__ == "__main__":
    run_script(main)
