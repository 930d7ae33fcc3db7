"""The verb `rsllm serve`: starts the endpoint on this machine, and ends it."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

from rsllm.config.plain import to_dict
from rsllm.errors import ConfigError, RsllmError, require
from rsllm.recommend.choose import chosen
from rsllm.recommend.load import load, open_ranker
from rsllm.recommend.ranker import Ranker
from rsllm.serve import LOOPBACK
from rsllm.serve.tokens import make_token, read_token
from rsllm.store.artifacts import cache_root

NAME = "rsllm"
QUIET: Any = {"log_level": "WARNING", "enable_access_log": False}
"""Of what Ray logs, which comes to this terminal; its metrics count requests anyway."""
AT_START = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rsllm.serve.guard:at_the_door",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
"""What Ray Serve's own processes read. On busy cores a process takes longer to start than the few
seconds after which Ray would start another one in its place, for ever."""
CHOSEN = "{} ranks by {} ({})"


def serve(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM, then answer what is under way and end.

    Raises:
        ConfigError: a flag that cannot be, or what would be open to strangers.
        RsllmError: it does not start.
    """
    try:
        from ray import serve as ray_serve
        from ray.exceptions import RayError

        from rsllm.serve.deploy import Endpoint, build
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing; pip install 'rsllm[serve]'") from error
    from rsllm.compute.start import cluster_resources, start_ray

    options = http_options(arguments)
    main, store = open_ranker(arguments.model, arguments.storage, arguments.precision)
    main = chosen(main, store, arguments.ranker)
    print(CHOSEN.format(main.name, main.by, main.why), flush=True)
    facts: dict[str, Any] = {"model": main.exported or main.name, "ranker": main.by}
    rankers = [main]
    if arguments.against:
        how: Any = {"storage": store.location, "precision": arguments.precision}
        rankers.append(load(arguments.against, **how))
        facts |= {"against": rankers[1].exported or rankers[1].name}
        facts |= {"against_ranker": rankers[1].by}
        print(CHOSEN.format(rankers[1].name, rankers[1].by, f"{arguments.share:.0%} of users"))
    token_file, shown = token_of(arguments.token_file)
    dashboard = start_ray()
    require(
        not ray_serve.status().proxies,
        "this Ray serves already; add an application with `serve deploy`, or use another Ray",
    )
    facts |= room(cluster_resources(), arguments.replicas, rankers)
    endpoint = Endpoint(
        why=main.why,
        storage=store.location,
        token_file=str(token_file),
        precision=arguments.precision,
        share=arguments.share,
        deadline_ms=arguments.deadline_ms,
        replicas=arguments.replicas,
        hosts=LOOPBACK if arguments.host in LOOPBACK else (),
        **facts,
    )
    del main, rankers  # the replicas have their own
    try:
        own = {"runtime_env": {"env_vars": AT_START}}
        logging.getLogger("ray.serve").setLevel(QUIET["log_level"])
        ray_serve.start("HeadOnly", options, logging_config=QUIET, controller_options=own)
        ray_serve.run(build(to_dict(endpoint)), name=NAME, route_prefix="/", logging_config=QUIET)
        say_hello(arguments, shown or f"$(cat {token_file})", dashboard)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("rsllm: answering what is under way", flush=True)
    except (RuntimeError, RayError) as error:
        raise RsllmError(f"the endpoint does not start: {error}") from error
    finally:
        if NAME in ray_serve.status().applications:
            ray_serve.delete(NAME)
        ray_serve.shutdown()


def http_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where it listens.

    Raises:
        ConfigError: strangers could listen or ask, or another process has the port.
    """
    host, port = arguments.host, arguments.port
    certificate, key = arguments.certificate, arguments.key
    require(bool(certificate) == bool(key), "--certificate and --key belong together; give both")
    require(
        host in LOOPBACK or bool(certificate and arguments.token_file),
        f"--host {host} is open to others; give --token-file, --certificate and --key, or leave it"
        " at 127.0.0.1 behind a proxy that speaks TLS",
    )
    for file in filter(None, (certificate, key)):
        require(file.is_file(), f"there is no file {file}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened to ({error.strerror})"
        ) from error
    # Ray's own default is all interfaces in some of its modes, so the host is always named.
    options: dict[str, Any] = {"host": host, "port": port}
    if key:
        options |= {"ssl_keyfile": str(key.absolute()), "ssl_certfile": str(certificate.absolute())}
    return options


def token_of(given: Path | None) -> tuple[Path, str]:
    """The token's file, and the token itself if it was made just now.

    Raises:
        ConfigError: a file that was named is missing, or others can read it.
    """
    file = (given or cache_root() / "serve-token").absolute()
    if given is None and not file.exists():
        return file, make_token(file)
    read_token(file)
    return file, ""


def room(there: Any, replicas: int, rankers: list[Ranker]) -> dict[str, int]:
    """The cores and GPUs of each replica: all that there are, dealt out.

    Raises:
        ConfigError: there are too few for so many replicas.
    """
    models = replicas * sum(ranker.by != "recommender" for ranker in rankers)
    gpus = int(there.gpus >= models > 0)
    cpus = int(there.cpus) // max(1, models)
    require(cpus > 0, f"--replicas {replicas} needs {models} cores; there are {there.cpus:.0f}")
    return {"cpus": cpus, "gpus": gpus}


def say_hello(arguments: argparse.Namespace, token: str, dashboard: str) -> None:
    """Print how to ask, and the token once, when it is new."""
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"{'https' if arguments.key else 'http'}://{host}:{arguments.port}"
    print(
        f"{address}/docs says what can be asked; {dashboard} shows what happens (tab Serve)\n"
        f"TOKEN={token}\n"
        f'curl -s {address}/v1/recommend -H "Authorization: Bearer $TOKEN"'
        ' -d \'{"history": ["Titanic (1997)"], "k": 5}\'\n'
        f"process {os.getpid()} serves; Ctrl-C ends it",
        flush=True,
    )
