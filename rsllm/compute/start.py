"""The Ray cluster that this process belongs to, or the one that it starts on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from rsllm.compute.layout import Layout, Resources, cpu_has_bf16, lay_out
from rsllm.config import ComputeConfig
from rsllm.errors import ConfigError, require
from rsllm.store.artifacts import cache_root
from rsllm.terminal import LIVE, say

WORKER_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
"""Leaves the terminal to progress, warnings and errors (the print patch prints lines twice), and
ends the group of a hung worker soon."""
NO_WARNINGS = {
    "DeepSpeed": "Setting accelerator to CPU",
    "ray._private.authentication.authentication_token_setup": "to opt out",
    "ray._private.services": "Found multiple active Ray instances",
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": "ontroller actor",
    "ray.tune.utils.util": "may be a performance bottleneck",
}
"""Warnings that loggers give where nothing is wrong: no GPU, a token, a second Ray on the machine,
a trial that was stopped early and is tidied up, or a machine that is busy with training."""
DASHBOARD_PORT = 8265
OTHER_PORTS = range(20000, 32768)
"""Above those of Ray's workers, below those that the system hands out."""
GPU_SECONDS, GPU_POLL_SECONDS = 1200.0, 15.0
"""How long a new node with a GPU may take, its set-up included."""
NOT_STARTED = {
    "timed out during startup": (
        "Ray did not start within the 30 s that it gives itself: this machine is too busy. Give the"
        " command again when less else runs"
    ),
    "address already in use": (
        "another program took port {port}, on which Ray's dashboard was to listen. Give the command"
        " again: it looks for a free one"
    ),
}
"""By what Ray says when it cannot start, what the user can do."""
interrupt_code = 128 + signal.SIGINT
"""Exit code of a process that was interrupted."""


def start_ray() -> str:
    """Join the cluster this process belongs to, or start one here with the dashboard on loopback.

    A Ray started here asks for a token, which only its owner can read. One that is joined and does
    not ask for any is warned of.

    Returns:
        The dashboard's address.

    Raises:
        ConfigError: RAY_AUTH_MODE would start one that does not ask for a token, or nothing that
            can be joined answers at RAY_ADDRESS, no port is left for the dashboard, or no GPU came.
    """
    import ray

    if not ray.is_initialized():
        quieten()
        running = _running_ray()
        if running is None:
            _guard_token()
        if not sys.stdout.isatty():  # Ray would colour what workers say in a file too
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        say(f"rsllm: joining the Ray at {running}" if running else "rsllm: starting Ray here")
        live = {LIVE: "1"} if sys.stdout.isatty() and sys.stderr.isatty() else {}
        hooks = {
            "env_vars": WORKER_ENVIRONMENT | live,
            "worker_process_setup_hook": prepare_worker,
        }
        with _start_lock():
            port = _free_port()
            # Inherited by a Ray started here: two must not ask each other's dashboard.
            os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
            try:
                ray.init(
                    address=running or "local",
                    include_dashboard=True,
                    dashboard_host="127.0.0.1",
                    dashboard_port=port,
                    logging_level="WARNING",
                    runtime_env=hooks,
                )
            except Exception as error:
                for said, remedy in NOT_STARTED.items():  # Ray has no errors of its own for them
                    if said in str(error):
                        raise ConfigError(remedy.format(port=port)) from error
                if running is None or not isinstance(error, RuntimeError):
                    raise
                # A running Ray of another version, of Ray or of Python, is the user's to mend.
                reason = " ".join(str(error).split())
                raise ConfigError(f"the Ray at {running} cannot be joined: {reason}") from error
    if ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE:
        _let_sigterm_end_the_driver()
        _wait_for_gpus(os.environ.get("RSLLM_GPUS") or "0")
    address = f"http://{ray.get_runtime_context().worker.node.webui_url}"
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    is_open(address)
    return address


@cache
def _wait_for_gpus(text: str) -> None:
    """Have the autoscaler bring so many GPUs, since what trains is planned by those that are there.

    Once they are, they stay as long as they have work.

    Raises:
        ConfigError: no number, or none came.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    require(text.isdecimal(), f"RSLLM_GPUS={text} is no number of GPUs; correct or unset it")
    wanted, deadline = int(text), time.monotonic() + GPU_SECONDS
    if not wanted:
        return
    request_resources(bundles=[{"GPU": 1}] * wanted)
    try:
        while (there := ray.cluster_resources().get("GPU", 0)) < wanted:
            if time.monotonic() > deadline:
                require(
                    there > 0, f"RSLLM_GPUS={text}, but none came; see `ray status`, or unset it"
                )
                return
            say(f"rsllm: {there:.0f} of {wanted} GPUs are there; the autoscaler brings the others")
            time.sleep(GPU_POLL_SECONDS)
    finally:
        request_resources(bundles=[])


@contextlib.contextmanager
def _start_lock() -> Iterator[None]:
    """Keep other processes of this user from starting a Ray, which would want the same port."""
    lock = FileLock(cache_root() / "ray.lock")
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        cache_root().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _running_ray() -> str | None:
    """The address of the Ray to join, if one answers; Ray goes on naming one that was killed."""
    from ray._private.services import canonicalize_bootstrap_address

    chosen = os.environ.get("RAY_ADDRESS", "")
    if "://" in chosen:
        raise ConfigError(f"RAY_ADDRESS={chosen} is not HOST:PORT of a Ray; unset it here")
    address: str | None = canonicalize_bootstrap_address(None)
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host.strip("[]"), port), timeout=5),
    ):
        return address
    if chosen:
        raise ConfigError(f"no Ray answers at RAY_ADDRESS={chosen}; start one there or unset it")
    say(f"rsllm: the Ray at {address} is gone; starting one here")
    return None


def _let_sigterm_end_the_driver() -> None:
    """Let SIGTERM end the driver as Ctrl-C does, but with code 143; Ray's handler has 15 or 1."""

    def leave(number: int, frame: Any) -> None:
        global interrupt_code
        interrupt_code = 128 + number
        raise KeyboardInterrupt  # Ray turns a SystemExit into one with its own code

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


def _guard_token() -> None:
    """Make sure that a Ray started here has a token, in a file that is its owner's alone.

    Ray would write the file readable by everybody.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        raise ConfigError("RAY_AUTH_MODE is disabled: anyone could run code as you; unset it")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        file = Path.home() / ".ray" / "auth_token"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.chmod(0o600)


@cache
def is_open(dashboard: str) -> bool:
    """Whether a cluster says that it asks for no token; the user is warned of that, once."""
    import httpx  # slow to import, and asked for once

    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
        if '"disabled"' in httpx.get(f"{dashboard}/api/authentication_mode", timeout=5).text:
            say("rsllm: warning: this Ray asks for no token; start it with RAY_AUTH_MODE=token")
            return True
    return False


def prepare_worker() -> None:
    """Make a process that Ray starts reachable, quiet and patient; every one of them runs this."""
    from ray.util import get_node_ip_address

    # OpenMP's threads would spin while they wait for each other, which on busy cores keeps those
    # they wait for from running. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Gloo would listen where the host's own name leads, which Debian and Ubuntu make 127.0.1.1.
    for interface, addresses in psutil.net_if_addrs().items():
        if get_node_ip_address() in [address.address for address in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    quieten()
    show = sys.unraisablehook

    # Ray's handler of SIGTERM raises SystemExit while Ray tidies up; inside the callback of a weak
    # reference Python cannot pass that on and would show it as an error.
    def show_errors(raised: sys.UnraisableHookArgs) -> None:
        if not issubclass(raised.exc_type, SystemExit):
            show(raised)

    sys.unraisablehook = show_errors


def quieten() -> None:
    """Keep from the user what libraries say to their own developers, or where nothing is wrong."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for logger in NO_WARNINGS:
        logging.getLogger(logger).addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return NO_WARNINGS.get(record.name, "\0") not in record.getMessage()


def _free_port() -> int:
    """The dashboard's usual port, or a random one that no process of Ray is given in between."""
    for port in (DASHBOARD_PORT, *random.sample(OTHER_PORTS, len(OTHER_PORTS))):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ConfigError(f"no port of {OTHER_PORTS} is free for the dashboard; end what listens there")


def quiet_ray_data(level: int = logging.CRITICAL) -> Any:
    """Ray Data's context; its progress bars, and what is below a level, stay off the terminal."""
    from ray.data.context import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(level)
    return context


def cluster_resources() -> Resources:
    """The CPUs and GPUs of the nodes that train: those with GPUs, if there are any."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [n for n in alive if n.get("GPU", 0)] or [n for n in alive if n.get("CPU", 0) >= 1]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return Resources(cpus=cpus, gpus=gpus, nodes=max(1, len(nodes)), bf16=cpu_has_bf16())


def lay_out_on_cluster(compute: ComputeConfig) -> Layout:
    """`rsllm.compute.layout.lay_out` on the cluster that Ray is connected to."""
    start_ray()
    return lay_out(compute, cluster_resources())
