"""Can this machine, or the cluster that it belongs to, run rsllm? If not, what is to be done?"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import torch
from packaging.requirements import Requirement
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed import TCPStore, all_reduce, init_process_group  # type: ignore[attr-defined]

from rsllm.assets.catalogue import fingerprint, resolve_backbone
from rsllm.compute.start import is_open, start_ray
from rsllm.config import Experiment
from rsllm.errors import RsllmError
from rsllm.model.backbone import check_backbone
from rsllm.store.artifacts import Store, cache_root, require_writable
from rsllm.terminal import as_json

LIBRARIES = ["rsllm", "torch", "ray", "transformers", "deepspeed"]
WAIT_SECONDS = 120
"""A node that does not answer for so long counts as lost."""
Check = tuple[str, str, str, str]
"""A name, the finding, "ok", "warn" or "fail", and what to do about it."""
FIELDS = ("check", "finding", "verdict", "remedy")


def examine(storage: str | Path, backbone: str | None = None) -> Iterator[Check]:
    """Look at the installation, the storage and the cache, at Ray and at every node of it.

    A backbone is looked at too, if there is one. Each check comes as soon as it is known.

    Joins the cluster that this process belongs to, or starts one here, as experiments do.
    """
    look = partial(_look_at_versions, "versions")
    versions, *_ = checks = [*_attempt("versions", "install rsllm again", look)]
    yield from checks
    folders = {"cache (RSLLM_CACHE)": cache_root()}
    if "://" in str(storage):
        yield from _attempt("storage", "choose another", partial(_look_at_uri, str(storage)))
    else:
        folders = {"storage": Path(storage)} | folders
    if backbone:
        yield from _attempt("backbone", "see there", partial(_look_at_backbone, backbone))
    for name, folder in folders.items():
        yield from _attempt(name, "choose another", partial(_look_at_folder, name, folder))
    seen = [folder for folder in folders.values() if os.access(folder, os.W_OK)]
    yield from _attempt("ray", "RAY_ADDRESS and token", partial(_look_at_ray, versions, seen))


def report(checks: Iterable[Check], *, for_programs: bool = False) -> None:
    """Print the checks as they come, or for programs all of them as JSON.

    Raises:
        RsllmError: one fails.
    """
    seen = []
    for check in checks:
        seen.append(check)
        name, finding, verdict, remedy = check
        if for_programs:
            continue
        print(f"{verdict:5} {name:22} {finding}", flush=True)
        if remedy:
            print(f"{'':5} {'':22} what to do: {remedy}", flush=True)
    if for_programs:
        print(as_json([dict(zip(FIELDS, check, strict=True)) for check in seen]))
    if failed := [name for name, _, verdict, _ in seen if verdict == "fail"]:
        raise RsllmError(f"{len(failed)} of {len(seen)} checks failed: {', '.join(failed)}")


def _judge(name: str, finding: str, bad: object, remedy: str, verdict: str = "fail") -> Check:
    return (name, finding, verdict, remedy) if bad else (name, finding, "ok", "")


def _attempt(name: str, remedy: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except (RsllmError, ConnectionError, RayError, metadata.PackageNotFoundError) as error:
        yield (name, str(error).strip().splitlines()[-1], "fail", remedy)


def _look_at_versions(name: str, expected: str = "") -> list[Check]:
    """Compare what is installed with what rsllm needs and, on a node, with what the driver has."""
    needs = {n.name: n for n in map(Requirement, metadata.requires("rsllm") or []) if not n.marker}
    installed = {name: metadata.version(name) for name in [*LIBRARIES, *needs]}
    bad = [
        name for name, need in needs.items() if not need.specifier.contains(installed[name], True)
    ]
    finding = ", ".join(f"{name} {installed[name]}" for name in bad or LIBRARIES)
    remedy = f"pip install {' '.join(repr(str(needs[n])) for n in bad) or 'what the driver has'}"
    return [_judge(name, finding, bad or finding != (expected or finding), remedy)]


def _look_at_folder(name: str, folder: Path) -> list[Check]:
    require_writable(folder, name, "choose another")
    free = shutil.disk_usage(folder).free / 2**30
    return [_judge(name, f"{folder}, {free:.0f} GiB free", free < 10, "make room", "warn")]


def _look_at_uri(storage: str) -> list[Check]:
    return [_judge("storage", f"{Store.open(storage).location}, writable", False, "")]


def _look_at_backbone(source: str) -> list[Check]:
    folder = resolve_backbone(source)
    config = check_backbone(folder, Experiment())
    finding = f"{config.model_type}, {config.num_hidden_layers} layers, {fingerprint(folder)}"
    return [_judge("backbone", finding, False, "")]


def _look_at_ray(versions: Check, folders: Sequence[Path]) -> Iterator[Check]:
    yield from _look_at_access(start_ray())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.NamedTemporaryFile(dir=f)).name for f in folders]
        tasks = [_on(node, _look_around, node, versions[1], files) for node in nodes]
        for node, task in zip(nodes, tasks, strict=True):
            look = partial(ray.get, task, timeout=WAIT_SECONDS)
            host = node["NodeManagerHostname"]
            yield from _attempt(host, "see ray status; is rsllm there?", look)
    yield from _send_round(nodes)


def _look_at_access(dashboard: str) -> list[Check]:
    """Look at who can reach the cluster, and who knows the token."""
    public, away = is_open(dashboard), not dashboard.startswith("http://127.")
    checks = [_judge("token", f"asked for: {not public}", public, "ray start, RAY_AUTH_MODE=token")]
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not os.environ.get("RAY_AUTH_TOKEN") and file.exists():
        mode = file.stat().st_mode & 0o777
        checks += [_judge("token file", f"{file}, {mode:o}", mode & 0o077, f"chmod 600 {file}")]
    return [*checks, _judge("dashboard", dashboard, away, "--dashboard-host=127.0.0.1", "warn")]


def _look_around(node: dict[str, Any], versions: str, files: Sequence[str]) -> list[Check]:
    """Look, on a node, at what Ray has there, and for the driver's versions and files."""
    host, has = node["NodeManagerHostname"], node["Resources"]
    gpus, seen = has.get("GPU", 0), torch.cuda.device_count()
    memory, store = has["memory"] / 2**30, has["object_store_memory"] / 2**30
    size = f"{has.get('CPU', 0):g} CPUs, {gpus:g} GPUs, {memory:.1f} GiB of memory"
    hidden = ", ".join(file for file in files if not os.access(file, os.W_OK))
    shm = shutil.disk_usage("/dev/shm").total / 2**30
    return [
        _judge(f"{host} size", size, memory < 4, "ask rsllm plan what fits", "warn"),
        _judge(f"{host} CUDA", f"{seen} GPUs", gpus and not seen, "PyTorch for nvidia-smi's CUDA"),
        *_look_at_versions(f"{host} versions", versions),
        _judge(f"{host} folders", hidden or "seen", hidden, "those that every node mounts"),
        _judge(f"{host} /dev/shm", f"{shm:.1f} GiB", shm < store, f"{store:.1f} GiB", "warn"),
    ]


def _send_round(nodes: Sequence[dict[str, Any]]) -> Iterator[Check]:
    """One sum over workers on every node, at least two, by the network that training uses."""
    workers = max(2, len(nodes))
    store = TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False)
    where = (workers, store.host, store.port)
    tasks = [_on(nodes[rank % len(nodes)], _sum_ranks, rank, *where) for rank in range(workers)]
    remedy = "open all ports between nodes; GLOO_SOCKET_IFNAME=the interface that they share"
    # Not returned: the workers meet at `store`, which lives as long as this function.
    yield from _attempt("round trip", remedy, partial(ray.get, tasks[0], timeout=WAIT_SECONDS))


def _sum_ranks(rank: int, workers: int, host: str, port: int) -> list[Check]:
    """Sum all workers' ranks, on a node, and judge the sum."""
    store = TCPStore(host, port, is_master=False)
    init_process_group("gloo", None, timedelta(seconds=WAIT_SECONDS / 2), workers, rank, store)
    ranks, start = torch.full((1024**2,), float(rank)), time.perf_counter()
    all_reduce(ranks)
    finding = f"{workers} workers, 4 MiB summed in {time.perf_counter() - start:.3f} s"
    return [_judge("round trip", finding, (ranks != sum(range(workers))).any(), "wrong sum")]


def _on(node: dict[str, Any], function: Any, *args: Any) -> Any:
    """Call a function on that node, in a process of its own; returns the reference."""
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    gpus = 0.01 if "GPU" in node["Resources"] else 0  # without a share it would see none
    own = {"num_cpus": 0, "num_gpus": gpus, "max_calls": 1, "max_retries": 0}
    return ray.remote(scheduling_strategy=place, **own)(function).remote(*args)
