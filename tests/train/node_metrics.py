"""Logs what a run measured, and prints as JSON what the node's Prometheus port then shows of it.

Called as `node_metrics.py STORE MEASURED`, MEASURED being JSON: curves' names and values.
"""

from __future__ import annotations

import json
import re
import sys
import time

import httpx
import ray
import torch.distributed as dist

from rsllm.compute.layout import Resources, lay_out
from rsllm.compute.start import start_ray
from rsllm.config import Experiment
from rsllm.store.artifacts import Store
from rsllm.train.assignment import Assignment
from rsllm.train.worker import _log


def main(store: str, measured: dict[str, float]) -> None:
    """Log once, then wait until all of it is shown."""
    start_ray()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    experiment = Experiment()
    assignment = Assignment(
        stage="stage2",
        experiment=experiment,
        layout=lay_out(experiment.compute, Resources(cpus=2, gpus=0)),
        store=Store.open(store),
        inputs={"test": store},
        data="",
    )
    with _log(assignment, num_steps=3) as log:
        log(3, measured)
    names = {re.sub(r"\W+", "_", name).lower() for name in (*measured, "memory_gibibytes")}
    deadline = time.monotonic() + 150
    while not names <= (shown := exported(assignment.name)).keys():
        if time.monotonic() > deadline:
            sys.exit(f"not shown: {names - shown.keys()}")
        time.sleep(1)
    print(json.dumps(shown))


def exported(run: str) -> dict[str, float]:
    """Ray's metrics of a run, as Prometheus reads them from the node, in lower case."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    lines = re.findall(r"^ray_rsllm_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, tags, value in lines if f'run="{run}"' in tags}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
