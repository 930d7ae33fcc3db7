"""Can this machine, or the cluster that it belongs to, run rsllm? If not, what is to be done?"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tabulate import tabulate
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rsllm.assets import cache_root
from rsllm.cluster import is_open, start_ray
from rsllm.errors import ConfigError, RsllmError
from rsllm.runs import require_writable

LIBRARIES = ["rsllm", "torch", "ray", "transformers", "deepspeed"]
WAIT_SECONDS = 60
"""After which a node that does not answer counts as lost."""
MEMORY_GIB, DISK_GIB = 4, 10
"""Less is a warning."""
GIB = 2**30


class Check(NamedTuple):
    """What was looked at, what was found, and what to do about it."""

    check: str
    finding: str
    verdict: str = "ok"
    """ok, warn or fail."""
    remedy: str = ""


def examine(storage: Path) -> list[Check]:
    """Look at the installation, the storage and the cache, at Ray and at every node of it.

    Joins the cluster that this process belongs to, or starts one here, as experiments do.
    """
    checks = _attempt("versions", "install rsllm again", _look_at_versions, "versions")
    for name, folder in {"storage": storage, "cache": cache_root()}.items():
        remedy = "another: --storage, RSLLM_CACHE"
        checks += _attempt(name, remedy, _look_at_folder, name, folder)
    shared = [folder for folder in (storage, cache_root()) if os.access(folder, os.W_OK)]
    remedy = "see that RAY_ADDRESS, RAY_AUTH_MODE and the token are right"
    return checks + _attempt("ray", remedy, _look_at_ray, checks[0].finding, shared)


def report(checks: Sequence[Check]) -> None:
    """Print the checks.

    Raises:
        RsllmError: one fails.
    """
    print(tabulate(checks, headers=Check._fields, maxcolwidths=[None, 60, None, 40]))
    if failed := [check.check for check in checks if check.verdict == "fail"]:
        raise RsllmError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _judge(name: str, finding: str, bad: object, remedy: str, verdict: str = "fail") -> Check:
    return Check(name, finding, verdict, remedy) if bad else Check(name, finding)


def _attempt(
    name: str, remedy: str, look: Callable[..., list[Check]], *args: Any, **options: Any
) -> list[Check]:
    try:
        return look(*args, **options)
    except (ConfigError, ConnectionError, RayError, metadata.PackageNotFoundError) as error:
        return [Check(name, str(error).strip().splitlines()[-1], "fail", remedy)]


def _look_at_versions(name: str, expected: str = "") -> list[Check]:
    """What is installed, against what rsllm needs and, on a node, what the driver has."""
    needs = [Requirement(line) for line in metadata.requires("rsllm") or []]
    needs = [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    bad = [n for n in needs if not n.specifier.contains(metadata.version(n.name), prereleases=True)]
    libraries = [need.name for need in bad] or LIBRARIES
    found = [f"{library} {metadata.version(library)}" for library in libraries]
    finding = ", ".join([*found, f"Python {platform.python_version()}"])
    remedy = f"pip install {' '.join(repr(str(need)) for need in bad)}" if bad else "as elsewhere"
    return [_judge(name, finding, bad or finding != (expected or finding), remedy)]


def _look_at_folder(name: str, folder: Path) -> list[Check]:
    require_writable(folder, name, "choose another")
    free = shutil.disk_usage(folder).free / GIB
    return [_judge(name, f"{folder}, {free:.0f} GiB free", free < DISK_GIB, "make room", "warn")]


def _look_at_ray(versions: str, folders: Sequence[Path]) -> list[Check]:
    checks = _look_at_access(start_ray())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    remedy = "see ray status, and that rsllm is installed there"
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.NamedTemporaryFile(dir=f)).name for f in folders]
        tasks = [_on(node, _look_around, node, versions, files) for node in nodes]
        for node, task in zip(nodes, tasks, strict=True):
            host = node["NodeManagerHostname"]
            checks += _attempt(host, remedy, ray.get, task, timeout=WAIT_SECONDS)
    return checks + _send_round(nodes)


def _look_at_access(dashboard: str) -> list[Check]:
    """Who can reach the cluster, and who knows the token."""
    everybody, remedy = is_open(dashboard), "start Ray with RAY_AUTH_MODE=token on every node"
    checks = [_judge("token", f"asked for: {not everybody}", everybody, remedy)]
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" not in os.environ and file.exists():
        mode = file.stat().st_mode & 0o777
        checks += [_judge("token file", f"{file}, {mode:o}", mode & 0o077, f"chmod 600 {file}")]
    away, remedy = not dashboard.startswith("http://127."), "--dashboard-host=127.0.0.1"
    return [*checks, _judge("dashboard", dashboard, away, remedy, "warn")]


def _look_around(node: dict[str, Any], versions: str, files: Sequence[str]) -> list[Check]:
    """On a node: what Ray has there, and whether the driver's versions and files are there."""
    host, has = node["NodeManagerHostname"], node["Resources"]
    gpus, memory = has.get("GPU", 0), has["memory"] / GIB
    size = f"{has.get('CPU', 0):g} CPUs, {gpus:g} GPUs, {memory:.1f} GiB of memory"
    seen = torch.cuda.device_count()
    unseen = ", ".join(file for file in files if not os.access(file, os.W_OK))
    shm, store = shutil.disk_usage("/dev/shm").total / GIB, has["object_store_memory"] / GIB
    return [
        _judge(f"{host} size", size, memory < MEMORY_GIB, "ask rsllm plan what fits", "warn"),
        _judge(f"{host} CUDA", f"{seen} GPUs", gpus and not seen, "PyTorch for nvidia-smi's CUDA"),
        *_look_at_versions(f"{host} versions", versions),
        _judge(f"{host} folders", unseen or "seen", unseen, "those that every node mounts"),
        _judge(f"{host} /dev/shm", f"{shm:.1f} GiB", shm < store, f"{store:.1f} GiB", "warn"),
    ]


def _send_round(nodes: Sequence[dict[str, Any]]) -> list[Check]:
    """One sum over workers on every node, at least two, by the network that training uses."""
    workers = max(2, len(nodes))
    store = TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False)
    where = (workers, store.host, store.port)
    tasks = [_on(nodes[rank % len(nodes)], _sum_ranks, rank, *where) for rank in range(workers)]
    remedy = "open all ports between nodes; GLOO_SOCKET_IFNAME=the interface that they share"
    return _attempt("round trip", remedy, ray.get, tasks[0], timeout=WAIT_SECONDS)


def _sum_ranks(rank: int, workers: int, host: str, port: int) -> list[Check]:
    """On a node: the sum of all workers' ranks, judged."""
    limit = timedelta(seconds=WAIT_SECONDS / 2)
    store = TCPStore(host, port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=limit)
    ranks, start = torch.full((1024**2,), float(rank)), time.perf_counter()
    dist.all_reduce(ranks)
    finding = f"{workers} workers, 4 MiB summed in {time.perf_counter() - start:.3f} s"
    wrong = not bool((ranks == workers * (workers - 1) / 2).all())
    return [_judge("round trip", finding, wrong, "the sum is wrong: test memory and network")]


def _on(node: dict[str, Any], function: Any, *args: Any) -> Any:
    """Call a function on that node, in a process of its own; returns the reference."""
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    gpus = 0.01 if "GPU" in node["Resources"] else 0  # without a share it would see none
    own = {"num_cpus": 0, "num_gpus": gpus, "max_calls": 1, "max_retries": 0}
    return ray.remote(scheduling_strategy=place, **own)(function).remote(*args)
