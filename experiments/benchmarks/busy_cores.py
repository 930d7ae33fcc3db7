"""What do waiting threads cost on a machine that does other things, and what when it does not?

Threads of an OpenMP team that are done wait for the others: by default they spin, so on busy cores
they keep those that they wait for from running. Each way of waiting is a process of its own, since
OpenMP reads it once; they take turns at the same work on MovieLens-100K with as many threads as
cores, with a process of pure Python on every core and without. Three kinds of work, each as in the
process that does it in a run: a train step in bf16, ranking in one pass, a step of the recommender.
Ratios are the default's seconds over a way's, medians over rounds; work that is not done after two
minutes counts as two minutes, so its ratio is a lower bound. Where root may, the idle rounds run
before all other processes (nice -20), for machines that are never idle; what those took of the
cores all the same stands in the file.

    python experiments/benchmarks/busy_cores.py --out results.json

Cost: about 15 minutes on two cores. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from tabulate import tabulate

from rsllm import Experiment, Pipeline, replace_in
from rsllm.cli import run_script
from rsllm.store.artifacts import provenance, write_json

WAYS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
}
"""GNU's OpenMP, which torch brings, spins 0 (passive) or some 300,000 times by default."""
GOALS = {"busy": 3.0, "idle": 0.97}
CORES = os.cpu_count() or 1
SECONDS = 2.0
"""For which work is repeated, at least once."""
LIMIT = 120.0
"""After which it is given up, in this round and all that follow."""
SETTINGS = {
    "stage2.batch_size": 2,
    "stage2.loss.alpha": 0.0,
    "stage2.loss.beta": 0.0,
    "stage2.loss.gamma": 0.0,
}


def train_step(data: Any, backbone: str) -> Callable[[], Any]:
    """One of stage 2, of two rows."""
    import torch

    from rsllm.model import tuned
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.train.engine import Engine
    from rsllm.train.stages import LanguageTask

    experiment = replace_in(Experiment(), SETTINGS)
    items = ItemEmbeddings(torch.randn(len(data.titles), 64), source="random")
    model = tuned.build(experiment, "unified", backbone, data, items, dtype=torch.float32)
    stage = experiment.stage2
    task = LanguageTask(experiment, stage, data, model, name="stage2", autocast=True)
    engine = Engine(task.objective, task.optimization, zero_stage=2, bf16=False)
    batches = task.batches(1)
    return lambda: engine.step(batches, 0)


def ranking(data: Any, backbone: str) -> Callable[[], Any]:
    """One user's candidates, by the likelihood of their titles."""
    import torch

    from rsllm.config import LossConfig
    from rsllm.evaluate.rank import fixed_sample, score_candidates
    from rsllm.model import tuned
    from rsllm.model.objective import LanguageObjective

    plain: dict[str, Any] = {"dtype": torch.float32, "lora": False}
    model = tuned.build(Experiment(), "text", backbone, data, None, **plain)
    objective = LanguageObjective(model.hybrid, LossConfig(), autocast=True)
    user = fixed_sample(data.rows("validation"), 1)
    given = (objective, user, model.encoder, data, "likelihood")
    return lambda: score_candidates(*given, batch_size=1)


def recommender_step(data: Any, backbone: str) -> Callable[[], Any]:
    """One of SASRec's training."""
    from rsllm.train.engine import Engine
    from rsllm.train.recommender import RecommenderTask

    task = RecommenderTask(Experiment(), data)
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    return lambda: engine.step(task.batches(0), 0)


TASKS = {f.__name__.replace("_", " "): f for f in (train_step, ranking, recommender_step)}


def serve(name: str, way: str, storage: Path) -> None:
    """Do what is asked for whenever a line comes, and say how many seconds one took."""
    for variable in [n for n in os.environ if n.startswith(("OMP_", "GOMP_", "KMP_"))]:
        del os.environ[variable]  # rsllm's own way of waiting too
    os.environ |= WAYS[way]
    import torch
    import torch.distributed as dist

    from rsllm.data.prepared import PreparedData

    torch.set_num_threads(CORES)
    pipeline = Pipeline(Experiment(), storage)
    data = PreparedData.open(pipeline.prepare())
    if name != "ranking":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    work = TASKS[name](data, pipeline.backbone)
    print("ready", flush=True)
    for _ in sys.stdin:
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < SECONDS:
            work()
            count += 1
        print((time.perf_counter() - start) / count, flush=True)


class Worker:
    """A process that does one kind of work and waits in one way."""

    def __init__(self, task: str, way: str, storage: Path) -> None:
        command = [sys.executable, __file__, "--storage", str(storage), "--serve", task, way]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0"}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        while self._line() != "ready":
            pass

    def seconds(self, *, first: bool) -> float:
        """What its work takes, if root may say so, before all other processes."""
        if self.process.poll() is not None:
            return LIMIT
        nice = -20 if first else 0
        with contextlib.suppress(OSError):  # where Linux shares out time among sessions first
            Path(f"/proc/{self.process.pid}/autogroup").write_text(str(nice))
        for thread in psutil.Process(self.process.pid).threads():
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, thread.id, nice)
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], LIMIT)[0]:
            self.process.kill()
            self.process.wait()
            return LIMIT
        return float(self._line())

    def busy_seconds(self) -> float:
        """That it has worked since it started; 0 once it was given up."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return float(sum(psutil.Process(self.process.pid).cpu_times()[:2]))
        return 0.0

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker has ended; what it said stands above")
        return line.strip()


@contextlib.contextmanager
def load(busy: bool) -> Iterator[None]:
    """A process of pure Python on every core, or none."""
    spinning = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spinning) for _ in range(CORES * busy)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy_seconds() -> float:
    """That the cores have worked since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def measure(task: str, storage: Path, rounds: int) -> tuple[Any, list[float]]:
    """Every round's seconds by load and way, and what others took of the cores when idle."""
    workers = {way: Worker(task, way, storage) for way in WAYS}
    seconds: Any = {name: {way: [] for way in WAYS} for name in ("idle", "busy")}
    others = []
    for worker in workers.values():
        worker.seconds(first=True)  # to warm up
    for name, taken in seconds.items():
        for number in range(rounds):
            with load(name == "busy"):
                for way, worker in workers.items():
                    start, before = time.monotonic(), busy_seconds() - worker.busy_seconds()
                    taken[way].append(worker.seconds(first=name == "idle"))
                    left = busy_seconds() - worker.busy_seconds() - before
                    others += [left / (time.monotonic() - start) / CORES] * (name == "idle")
            print(f"{task}, {name}: round {number + 1} of {rounds}", flush=True)
    for worker in workers.values():
        worker.process.kill()
        worker.process.wait()
    return seconds, others


def main() -> None:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve, arguments.storage)
        return
    Pipeline(Experiment(), arguments.storage).prepare()
    rows, others, every = [], [], {}
    for task in TASKS:
        every[task], taken = measure(task, arguments.storage, arguments.rounds)
        others += taken
        for name, ways in every[task].items():
            rows += [
                {
                    "machine": name,
                    "task": task,
                    "way": way,
                    "seconds": statistics.median(own),
                    "times faster": statistics.median(
                        default / one for default, one in zip(ways["default"], own, strict=True)
                    ),
                    "best against best": min(ways["default"]) / min(own),
                    "goal": None if way == "default" else GOALS[name],
                }
                for way, own in ways.items()
            ]
    found = {
        "ways": rows,
        "seconds": every,
        "others_share_of_cores_when_idle": statistics.median(others),
        "cores": CORES,
        "limit": LIMIT,
        "load_average": os.getloadavg(),
        "provenance": provenance(),
    }
    if arguments.out:
        write_json(arguments.out, found)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    print(f"when idle, other processes took {statistics.median(others):.0%} of the cores (median)")


if __name__ == "__main__":
    run_script(main)
