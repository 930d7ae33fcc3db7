"""What a stranger can do with a Ray that rsllm starts; prints it as JSON. Run as a process.

python open_ports.py FOLDER             start one as rsllm does
python open_ports.py FOLDER disabled    start one that asks for no token, and let rsllm join it
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import ray

from rsllm.compute.start import start_ray
from rsllm.doctor import examine

CALLS = (
    "CoreWorkerService/PushTask",
    "InternalKVGcsService/InternalKVPut",
    "NodeManagerService/RequestWorkerLease",
    "ObjectManagerService/Push",
    "ReporterService/GetTraceback",
)
"""One method of every service that Ray listens with."""
ROUTES = ("/api/version", "/api/jobs/", "/nodes?view=summary", "/logs", "/api/v0/tasks")


def called(port: int) -> set[str]:
    """What the port says to calls without a token; UNAVAILABLE: it does not speak gRPC."""
    answers = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for call in CALLS:
            try:
                channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=30)
                answers.add("OK")
            except grpc.RpcError as error:
                answers.add(error.code().name)
    return answers


def asked(ip: str, port: int) -> tuple[int, str]:
    """Status and type of the page that the port gives without a token."""
    host = "127.0.0.1" if ip in ("0.0.0.0", "::") else ip
    answer = httpx.get(f"http://{host}:{port}/api/job_agent/jobs/", timeout=30)
    return answer.status_code, answer.text[:6]


def attack(dashboard: str) -> dict[str, Any]:
    """Everything that needs no token, or a wrong one."""
    wrong = {"Authorization": "Bearer " + "0" * 64}
    job = {"entrypoint": "true"}
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    grpc_ports, http_ports, lines = {}, {}, []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, httpx.ConnectError):
            lines.append(" ".join(process.cmdline()))
            for found in process.net_connections("inet"):
                if found.status == psutil.CONN_LISTEN:
                    ip, port = found.laddr
                    answers = called(port)
                    if answers == {"UNAVAILABLE"}:
                        http_ports[f"{ip}:{port}"] = asked(ip, port)
                    else:
                        grpc_ports[f"{ip}:{port}"] = sorted(answers)
    client = httpx.Client(base_url=dashboard, timeout=30)
    return {
        "routes": [client.get(route).status_code for route in ROUTES],
        "wrong token": client.get(ROUTES[0], headers=wrong).status_code,
        "job": client.post("/api/jobs/", json=job).status_code,
        "grpc": grpc_ports,
        "http": http_ports,
        "command lines": lines,
    }


def main() -> None:
    """Start, look, print."""
    folder = Path(sys.argv[1])
    if "disabled" in sys.argv:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        with socket.create_server(("127.0.0.1", 0)) as probe:  # the other one takes the usual port
            port = probe.getsockname()[1]
        where = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        ray.init(address="local", num_cpus=1, log_to_driver=False, **where)
        print(json.dumps([*examine(folder / "store")]))
        return
    dashboard = start_ray()
    ray.get(ray.remote(num_cpus=0)(lambda: print("a task")).remote())
    file = folder / ".ray" / "auth_token"
    facts = {"dashboard": dashboard, "mode": oct(stat.S_IMODE(file.stat().st_mode))}
    print(json.dumps(facts | attack(dashboard)))


if __name__ == "__main__":
    main()
