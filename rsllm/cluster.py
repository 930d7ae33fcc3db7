"""The Ray cluster that this process belongs to, or the one that it starts on this machine."""

from __future__ import annotations

import os
import socket
import sys

from rsllm.config import ComputeConfig
from rsllm.plan import Layout, Resources, cpu_has_bf16, lay_out

WORKER_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
"""Leaves the terminal to progress, warnings and errors; the print patch prints lines twice. The
allocator joins what is freed: otherwise no freed tensor makes room for one of its own size."""
DASHBOARD_PORT = 8265


def start_ray() -> str:
    """Join the cluster this process belongs to, or start one here with the dashboard on loopback.

    Returns:
        The dashboard's address.
    """
    import ray

    if not ray.is_initialized():
        port = _free_port()
        # Inherited by a Ray started here: two on one machine must not ask each other's dashboard.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        ray.init(
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            logging_level="WARNING",
            runtime_env={
                "env_vars": WORKER_ENVIRONMENT,
                "worker_process_setup_hook": leave_quietly,
            },
        )
    address = f"http://{ray.get_runtime_context().worker.node.webui_url}"
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    return address


def leave_quietly() -> None:
    """Let a worker that Ray ends while it tidies up print no traceback of that; runs in each.

    Ray's handler of SIGTERM raises `SystemExit`; inside the callback of a weak reference Python
    cannot pass that on and would show it as an error.
    """
    show = sys.unraisablehook

    def show_errors(raised: sys.UnraisableHookArgs) -> None:
        if not issubclass(raised.exc_type, SystemExit):
            show(raised)

    sys.unraisablehook = show_errors


def _free_port() -> int:
    """The dashboard's usual port, or a random one: two that start at once must not both take it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DASHBOARD_PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cluster_resources() -> Resources:
    """What the cluster that Ray is connected to has."""
    import ray

    total = ray.cluster_resources()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return Resources(
        cpus=total.get("CPU", 0),
        gpus=total.get("GPU", 0),
        nodes=max(1, len(nodes)),
        bf16=cpu_has_bf16(),
    )


def lay_out_on_cluster(compute: ComputeConfig) -> Layout:
    """`rsllm.plan.lay_out` on the cluster that Ray is connected to."""
    start_ray()
    return lay_out(compute, cluster_resources())
