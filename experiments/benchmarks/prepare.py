"""How fast is `rsllm prepare`, how does its cost grow, and what memory does it need?

The reference is a single process with Polars that does the same steps (polars_prepare.py), on the
same synthetic interactions in the same run, interleaved. Both start from nothing, so rsllm's time
includes Ray's start. At the end both run under a memory limit that is too small for the reference.

    python experiments/benchmarks/prepare.py --out experiments/results/benchmarks/prepare.json

Cost: about 10 minutes and 8 GB of disk on 2 cores. Needs `pip install -e ".[bench]"`; the memory
limit needs root and cgroups, and is left out without them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tabulate import tabulate

from rsllm.data.synthetic import write_world

LENGTH, NUM_ITEMS, NOISE = 100, 20_000, 0.5
REPEATS = {1_000_000: 3, 5_000_000: 2}
REFERENCE = Path(__file__).with_name("polars_prepare.py")
CGROUP = Path("/sys/fs/cgroup/memory")
SAMPLE_SECONDS = 0.2
KINDS = {"ray::ReadRange": "worker", "raylet": "ray", "gcs_server": "ray", "ray::": "ray"}


def main() -> None:
    """Run everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1e6,5e6,20e6", help="interactions (%(default)s)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--limit", type=float, default=3.0, help="memory limit in GB (%(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sizes = [int(float(size)) for size in arguments.sizes.split(",")]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        worlds = {size: world_of(size, Path(scratch)) for size in sizes}
        runs = [
            {
                "interactions": size,
                "engine": engine,
                **measured(engine, worlds[size], Path(scratch)),
            }
            for size in sizes
            for _ in range(REPEATS.get(size, 1))
            for engine in ("rsllm", "polars")
        ]
        limited = under_a_limit(worlds[sizes[-1]], Path(scratch), arguments.limit)
    result = {"summary": summary(runs, sizes), "limited": limited, "runs": runs, **facts()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(tabulate(result["summary"]["sizes"], headers="keys", floatfmt=".3g"))
    print({name: value for name, value in result["summary"].items() if name != "sizes"}, limited)


def world_of(size: int, scratch: Path) -> Path:
    """A synthetic world of about `size` interactions."""
    folder = scratch / f"world-{size}"
    write_world(
        folder, num_users=size // LENGTH, num_items=NUM_ITEMS, length=LENGTH, seed=0, noise=NOISE
    )
    return folder


def command(engine: str, world: Path, out: Path) -> list[str]:
    """What is timed."""
    if engine == "polars":
        return [sys.executable, str(REFERENCE), str(world), str(out)]
    rsllm = str(Path(sys.executable).with_name("rsllm"))
    return [rsllm, "prepare", "--data", str(world), "--storage", str(out)]


def measured(engine: str, world: Path, scratch: Path) -> dict[str, Any]:
    """Seconds and peak memory of one run, from its start to its end."""
    out = scratch / f"out-{engine}"
    start = time.perf_counter()
    with (scratch / "log").open("w") as log:
        job = subprocess.Popen(command(engine, world, out), stdout=log, stderr=log)
        peaks = watch(job)
    seconds = time.perf_counter() - start
    if job.returncode:
        raise SystemExit((scratch / "log").read_text())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {"seconds": seconds, "written_mb": size / 1e6, **peaks}


def watch(job: subprocess.Popen[bytes]) -> dict[str, float]:
    """Highest unique memory of any process of each kind, and of all together, in MB."""
    peaks: dict[str, float] = {}
    root = psutil.Process(job.pid)
    while job.poll() is None:
        total: dict[str, float] = {}
        shared = 0
        for process in [root, *descendants(root)]:
            try:
                memory = process.memory_full_info()
                name = " ".join(process.cmdline())
            except psutil.Error:
                continue
            kind = next((kind for part, kind in KINDS.items() if part in name), "driver")
            total[kind] = max(total.get(kind, 0), memory.uss / 1e6)
            total["all"] = total.get("all", 0) + memory.pss / 1e6
            shared = max(shared, memory.shared)
        for kind, size in total.items():
            peaks[f"{kind}_mb"] = max(peaks.get(f"{kind}_mb", 0), size)
        time.sleep(SAMPLE_SECONDS)
    return peaks


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All processes below one, as far as they still live."""
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def under_a_limit(world: Path, scratch: Path, gigabytes: float) -> dict[str, Any] | str:
    """How both engines end in a group that may use so much memory (page cache included)."""
    group = CGROUP / f"rsllm-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(gigabytes * 1e9)))
    except OSError as error:
        return f"not run: {error}"
    ends: dict[str, Any] = {"limit_gb": gigabytes}
    try:
        for engine in ("polars", "rsllm"):
            out, start = scratch / f"limited-{engine}", time.perf_counter()
            with (scratch / "log").open("w") as log:
                job = subprocess.run(
                    command(engine, world, out),
                    preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
                    stdout=log,
                    stderr=log,
                    check=False,
                )
            end = "finished" if job.returncode == 0 else f"killed ({job.returncode})"
            ends[engine] = {"end": end, "seconds": time.perf_counter() - start}
            shutil.rmtree(out, ignore_errors=True)
    finally:
        time.sleep(2)
        group.rmdir()
    return ends


def summary(runs: list[dict[str, Any]], sizes: list[int]) -> dict[str, Any]:
    """Medians by size, their ratios, and how cost grows."""

    def median(size: int, engine: str, name: str) -> float:
        found = [
            run.get(name, 0)
            for run in runs
            if (run["interactions"], run["engine"]) == (size, engine)
        ]
        return float(np.median(found))

    rows = [
        {
            "interactions": size,
            "rsllm_seconds": median(size, "rsllm", "seconds"),
            "polars_seconds": median(size, "polars", "seconds"),
            "rsllm_rows_per_second": size / median(size, "rsllm", "seconds"),
            "speed_ratio": median(size, "polars", "seconds") / median(size, "rsllm", "seconds"),
            "worker_mb": median(size, "rsllm", "worker_mb"),
            "driver_mb": median(size, "rsllm", "driver_mb"),
            "rsllm_all_mb": median(size, "rsllm", "all_mb"),
            "polars_mb": median(size, "polars", "all_mb"),
        }
        for size in sizes
    ]
    logs = np.log(
        [[row["interactions"], row["rsllm_seconds"], row["polars_seconds"]] for row in rows]
    )
    slopes = [float(np.polyfit(logs[:, 0], logs[:, i], 1)[0]) for i in (1, 2)] if rows[1:] else []
    return {"sizes": rows, "exponents": dict(zip(("rsllm", "polars"), slopes, strict=False))}


def facts() -> dict[str, Any]:
    """Machine and versions."""
    packages = ("rsllm", "ray", "pyarrow", "numpy", "polars")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores,"
        f" {psutil.virtual_memory().total / 1e9:.0f} GB",
        "packages": {name: metadata.version(name) for name in packages},
        "world": {"length": LENGTH, "items": NUM_ITEMS, "noise": NOISE},
    }


if __name__ == "__main__":
    main()
