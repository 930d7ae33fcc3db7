"""How many recommendations a second does the endpoint give, and what happens when more are asked?

Starts `rsllm serve` on this machine, once for each ranker, and asks it as a client over loopback:
one request at a time; as fast as it answers (8 at a time: the capacity); then at 0.5, 1, 2 and 4
times that rate whether it answers or not, so that what waits is measured from when it was due. The
capacity stands beside the rate of a bare loop in one process. Lists are compared with those that
Python gives. Last, requests are under way when the server is told to end.

The client shares the cores with the server, so the capacity is that of both: `core_ms` says what a
request costs each of them, and `lag_p95` by how much the client itself is late. Where a client is
as busy as the server, its own delay is all that one sees of refusals, so this one is a lean one.

    python experiments/benchmarks/serve.py stage-2/KEY --out results.json

With `--ranker recommender --minutes 10` it is asked at one rate for a minute and then ten more, and
the memory of its processes is written after each of them.

Cost: eight minutes for two rankers on two cores. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
import torch
from tabulate import tabulate

import rsllm
from rsllm.cli import run_script
from rsllm.recommend.ranker import Ranker
from rsllm.serve.arms import Question, answers
from rsllm.serve.deploy import BATCH
from rsllm.store.artifacts import provenance, write_json

LEVELS = (0.5, 1.0, 2.0, 4.0)
AT_ONCE, ALONE, COMPARED, ENDED = BATCH, 20, 16, 8
K, PATIENCE = 10, 600.0
COMMAND = "from rsllm.cli import main; raise SystemExit(main())"
SHOWN = (
    "ranker",
    "times",
    "asked",
    "goodput",
    "p50",
    "p95",
    "p99",
    "degraded",
    "refused",
    "failed",
)
Histories = list[list[str]]


def bare_rate(ranker: Ranker, pasts: Sequence[Any], seconds: float) -> float:
    """Questions a second in full batches, with nothing around the model."""
    opened = [Question(past, ranker.open_items(past), K) for past in pasts]
    batches = [opened[at : at + BATCH] for at in range(0, len(opened) - BATCH, BATCH)]
    answers(ranker, batches[0])
    start, done = time.perf_counter(), 0
    for batch in itertools.cycle(batches):
        answers(ranker, batch)
        done += len(batch)
        if (spent := time.perf_counter() - start) > seconds:
            break
    return done / spent


def unambiguous(ranker: Ranker, past: Sequence[Any]) -> bool:
    """Whether no id of a past is also a title, such as "187"."""
    return not any(ranker.data.source_ids[item] in ranker.data.titles for item in past)


@contextlib.contextmanager
def server(model: str, ranker: str, flags: argparse.Namespace, log: Path) -> Iterator[Any]:
    """A server that is ready, what a client of it is made with, and how long it took."""
    port = ["--port", str(flags.port), "--precision", "fp32"]
    command = [sys.executable, "-c", COMMAND, "serve", model, "--storage", flags.storage, *port]
    command += ["--ranker", ranker, "--deadline-ms", str(flags.deadline_ms)]
    token = flags.out.with_suffix(".token").absolute()
    token.touch(mode=0o600)
    token.write_text("made-for-one-measurement\n")
    address = f"http://127.0.0.1:{flags.port}"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--token-file", str(token)], stdout=file, stderr=file)
    try:
        start = time.perf_counter()
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                raise SystemExit(log.read_text())
            time.sleep(0.5)
        allowed = {"Authorization": f"Bearer {token.read_text().strip()}"}
        how = {"base_url": address, "headers": allowed, "timeout": aiohttp.ClientTimeout(60)}
        yield process, how, time.perf_counter() - start
    finally:
        token.unlink()
        process.terminate()
        process.wait(PATIENCE)


async def ask(
    client: aiohttp.ClientSession, history: list[str], due: float = 0.0
) -> dict[str, Any]:
    """One answer, and the seconds since it was due, or else since it was asked."""
    sent = time.perf_counter()
    start = due or sent
    lag = 1000 * (sent - start)
    try:
        async with client.post("/v1/recommend", json={"history": history, "k": K}) as found:
            text = await found.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        seconds = time.perf_counter() - start
        return {"status": type(error).__name__, "seconds": seconds, "lag": lag}
    seconds, answer = time.perf_counter() - start, json.loads(text)
    return {"status": found.status, "seconds": seconds, "lag": lag, "answer": answer}


async def closed_loop(
    client: aiohttp.ClientSession, histories: Histories, seconds: float
) -> list[Any]:
    """What came back while so many clients asked again and again."""
    end, found, turns = time.perf_counter() + seconds, [], itertools.cycle(histories)

    async def one() -> None:
        while time.perf_counter() < end:
            found.append(await ask(client, next(turns)))

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return found


async def open_loop(
    client: aiohttp.ClientSession, histories: Histories, rate: float, seconds: float
) -> tuple[list[Any], float]:
    """What came back at a rate, which does not wait for answers, and how long it all took."""
    chance, turns = random.Random(0), itertools.cycle(histories)
    start = due = time.perf_counter()
    tasks = []
    while (due := due + chance.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client, next(turns), due)))
    found = await asyncio.gather(*tasks)
    return list(found), time.perf_counter() - start


def summary(found: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Rates, shares and milliseconds of what came back."""
    good = [one for one in found if one["status"] == 200]
    refused = [one for one in found if one["status"] == 429]
    milliseconds = [1000 * one["seconds"] for one in good]
    quantiles = {f"p{q}": percentile(milliseconds, q) for q in (50, 95, 99)}
    return {
        "asked": len(found) / seconds,
        "goodput": len(good) / seconds,
        **quantiles,
        "degraded": sum(one["answer"]["degraded"] for one in good) / max(1, len(good)),
        "refused": len(refused) / max(1, len(found)),
        "refusal_p95": percentile([1000 * one["seconds"] - one["lag"] for one in refused], 95),
        "lag_p95": percentile([one["lag"] for one in found], 95),
        "failed": dict(Counter(str(o["status"]) for o in found if o["status"] not in (200, 429))),
    }


def percentile(values: Sequence[float], of: float) -> float | None:
    """One of them, or None of nothing."""
    return round(float(np.percentile(values, of)), 1) if values else None


def used(process: subprocess.Popen[bytes]) -> dict[str, tuple[float, float]]:
    """Resident MiB and seconds on a core of the server's processes, and of this one."""
    found = {"client": psutil.Process()}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            kind = re.search("ServeReplica:rsllm:(Api|Model)|ProxyActor", child.cmdline()[0])
            if kind:
                found[kind[0].split(":")[-1]] = child
    seconds = {name: sum(own.cpu_times()[:2]) for name, own in found.items()}
    return {n: (own.memory_info().rss / 2**20, seconds[n]) for n, own in found.items()}


async def memory(how: Any, process: Any, histories: Histories, flags: Any) -> dict[str, Any]:
    """Resident MiB of the server's processes, minute by minute at one rate.

    The first minute, in which libraries are loaded and threads started, counts as the start.
    """
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), **how) as client:
        minutes, found = [], []
        for _ in range(flags.minutes + 1):
            answered, _ = await open_loop(client, histories, flags.rate, 60.0)
            found += answered
            minutes.append({name: own[0] for name, own in used(process).items()})
            print(minutes[-1], flush=True)
    first, last = minutes[0], minutes[-1]
    growth = {name: last[name] / first[name] - 1 for name in first if name != "client"}
    server = [sum(own[name] for name in growth) for own in (first, last)]
    return {
        "rate": flags.rate,
        "questions": len(found),
        "mebibytes": minutes,
        "growth": growth | {"server": server[1] / server[0] - 1},
        **summary(found, 60.0 * len(minutes)),
    }


async def measure(
    process: Any, how: Any, ranker: Ranker, histories: Histories, seconds: float
) -> dict[str, Any]:
    """All that is asked of one server."""
    client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), **how)
    difference, same = await compare(client, ranker, histories[:COMPARED])
    alone = [await ask(client, history) for history in histories[:ALONE]]
    found = await closed_loop(client, histories, seconds)
    own = [one for one in found if one["status"] == 200 and not one["answer"]["degraded"]]
    capacity = len(own) / seconds
    levels, before = [], used(process)
    for times in LEVELS:
        answered, spent = await open_loop(client, histories, times * capacity, seconds)
        after = used(process)
        costs = {
            "mebibytes": {name: after[name][0] for name in after},
            "core_ms": {n: 1000 * (after[n][1] - before[n][1]) / len(answered) for n in after},
        }
        levels.append({"times": times, **summary(answered, spent), **costs})
        print(levels[-1], flush=True)
        before = after
    under_way = [asyncio.create_task(ask(client, history)) for history in histories[:ENDED]]
    await asyncio.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    start = time.perf_counter()
    ended = await asyncio.gather(*under_way)
    await client.close()
    code = await asyncio.to_thread(process.wait, PATIENCE)
    return {
        "largest_score_difference": difference,
        "same_items": same,
        "alone_ms": summary(alone, 1.0)["p50"],
        "capacity": capacity,
        "capacity_p95": summary(found, seconds)["p95"],
        "levels": levels,
        "ended": {
            "under_way": ENDED,
            "answered": sum(one["status"] == 200 for one in ended),
            "seconds": time.perf_counter() - start,
            "code": code,
        },
    }


async def compare(
    client: aiohttp.ClientSession, ranker: Ranker, histories: Histories
) -> tuple[float, bool]:
    """The largest difference of scores from those in Python, and whether all items are the same."""
    found = await asyncio.gather(*(ask(client, history) for history in histories))
    difference, same = 0.0, True
    for one, history in zip(found, histories, strict=True):
        if one["answer"]["degraded"]:
            continue
        table = ranker.recommend(history, k=K)
        scores = [item["score"] for item in one["answer"]["items"]]
        difference = max(difference, float(np.abs(table["score"] - scores).max()))
        same &= [item["item_id"] for item in one["answer"]["items"]] == table["item_id"].tolist()
    return difference, same


def main() -> None:
    """Measure; print and write what each ranker gives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="KIND/KEY of a tuned model with a recommender")
    parser.add_argument("--storage", default="rsllm-store", metavar="DIR")
    parser.add_argument("--ranker", action="append", help="(default: recommender, catalogue)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a level")
    parser.add_argument("--minutes", type=int, default=0, help="of one rate, to see memory grow")
    parser.add_argument("--rate", type=float, default=20.0, help="a second, with --minutes")
    parser.add_argument("--deadline-ms", type=int, default=2000)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for by in flags.ranker or ["recommender", "catalogue"]:
        own = rsllm.load(flags.model, storage=flags.storage, ranker=by, precision="fp32")
        pasts = [past[-own.window :] for past in [*own.pasts().values()][:400]]
        pasts = [past for past in pasts if unambiguous(own, past)]
        histories = [[own.data.source_ids[item] for item in past] for past in pasts]
        log = flags.out.with_suffix(".log")
        if flags.minutes:
            with server(own.name, by, flags, log) as (process, how, _):
                results[by] = asyncio.run(memory(how, process, histories, flags))
            continue
        bare = bare_rate(own, pasts, flags.seconds / 2)
        with server(own.name, by, flags, log) as (process, how, wait):
            found = asyncio.run(measure(process, how, own, histories, flags.seconds))
        ratio = {"bare_rate": bare, "ratio_to_bare": found["capacity"] / bare}
        results[by] = {"seconds_until_ready": wait, **ratio, **found}
    rows = [
        {"ranker": by, **level} for by, own in results.items() for level in own.get("levels", [own])
    ]
    write_json(
        flags.out,
        {
            "model": flags.model,
            "rankers": results,
            "seconds": flags.seconds,
            "deadline_ms": flags.deadline_ms,
            "at_once": AT_ONCE,
            "precision": "fp32",
            "threads": torch.get_num_threads(),
            "load_average": psutil.getloadavg(),
            "provenance": provenance(),
        },
    )
    print(tabulate([[row.get(name) for name in SHOWN] for row in rows], SHOWN, floatfmt=".2f"))


if __name__ == "__main__":
    run_script(main)
