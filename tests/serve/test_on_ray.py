"""`rsllm serve` as a user starts it: it answers, stands in, survives, and ends."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jobs
import numpy as np
import psutil
import pytest
from serve.conftest import TOKEN
from small_data import TITLES

from rsllm.errors import EvaluationError
from rsllm.recommend.load import open_ranker
from rsllm.serve.deploy import self_test
from rsllm.store.artifacts import Store

PASTS = [[TITLES[i], TITLES[j]] for i in range(4, 10) for j in range(11, 14)]
DEADLINE_MS = 20_000
RAYS_TOKEN = "0123456789abcdef" * 4
API, MODEL = "ServeReplica:rsllm:Api", "ServeReplica:rsllm:Model"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def processes(job: Any) -> dict[psutil.Process, str]:
    """The processes of the server with their command lines, without those that are dead."""
    found = {}
    for child in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[child] = " ".join(child.cmdline())
    return found


def process(job: Any, name: str) -> psutil.Process:
    """A process of the server by what Ray calls it."""
    (found,) = [own for own, line in processes(job).items() if f"ray::{name}" in line]
    return found


def shown_by_ray(job: Any, said: str) -> dict[str, str]:
    """What others may read: the terminal, command lines, Ray's logs and pages of its dashboard."""
    lines = "\n".join(processes(job).values())
    shown = {"terminal": said, "command lines": lines}
    (session,) = set(re.findall(r"--session_dir=(\S+)", lines))
    for file in Path(session, "logs").rglob("*"):
        with contextlib.suppress(OSError):  # a folder, or a log that is put away
            shown[str(file)] = file.read_text(errors="replace")
    (dashboard,) = re.findall(r"(\S+) shows what happens", said)
    allowed = {"Authorization": f"Bearer {RAYS_TOKEN}"}
    for page in ("/api/serve/applications/", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1"):
        found = httpx.get(f"{dashboard}{page}", headers=allowed, timeout=120)
        assert found.status_code == 200, found.text
        shown[page] = found.text
    assert '"rsllm"' in shown["/api/serve/applications/"]
    return shown


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_server_from_its_start_to_its_end(
    made: tuple[Store, dict[str, str]], tmp_path: Path
) -> None:
    store, log = Store.at(tmp_path / "store"), tmp_path / "log"
    shutil.copytree(made[0].root, store.root)
    name, port, token = made[1]["history"], free_port(), tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    ranker = replace(open_ranker(name, store.location, "fp32")[0], by="catalogue")
    command = [*jobs.CLI, "serve", name, "--storage", store.location, "--port", str(port)]
    command += ["--ranker", "catalogue", "--precision", "fp32", "--token-file", str(token)]
    command += ["--deadline-ms", str(DEADLINE_MS)]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        jobs.started(command, log, RAY_AUTH_TOKEN=RAYS_TOKEN) as job,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as client,
    ):
        jobs.wait_until(lambda: "Ctrl-C ends it" in log.read_text(), job, log)

        def post(history: list[str]) -> httpx.Response:
            return client.post("/v1/recommend", json={"history": history, "k": 5})

        def ask(history: list[str]) -> Any:
            found = post(history)
            assert found.status_code == 200, found.text
            return found.json()

        def assert_right(history: list[str], answer: Any) -> None:
            table = replace(ranker, by=answer["ranker"]).recommend(history, k=5)
            assert [i["item_id"] for i in answer["items"]] == table["item_id"].tolist()
            scores = [item["score"] for item in answer["items"]]
            np.testing.assert_allclose(scores, table["score"], atol=1e-5)

        with ThreadPoolExecutor(len(PASTS)) as threads:  # so that some share a batch
            for history, answer in zip(PASTS, threads.map(ask, PASTS), strict=True):
                assert_right(history, answer)
                assert (answer["ranker"], answer["degraded"]) == ("catalogue", False)
        assert client.get("/v1/model").json()["model"] == name
        assert client.get("/v1/model", headers={"Authorization": "Bearer no"}).status_code == 401
        too_large = client.post("/v1/rank", content=(b"x" * 1024 for _ in range(65)))
        assert too_large.status_code == 413

        process(job, "ServeController").kill()
        assert_right(PASTS[0], ask(PASTS[0]))

        model = process(job, MODEL)
        model.suspend()  # so that what is asked now is under way when the next one dies
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(post, history) for history in PASTS[:4]]
            time.sleep(1.0)
            process(job, API).kill()
            model.resume()
        for history, found in zip(PASTS[:4], (one.result() for one in asked), strict=True):
            # What came too late to be lost is answered; of what is lost test_guard.py says more.
            assert found.status_code in (200, 503), found.text
            if found.status_code == 200:
                assert_right(history, found.json())
        jobs.wait_until(lambda: post(PASTS[1]).status_code == 200, job, log)
        assert_right(PASTS[1], ask(PASTS[1]))

        (store.root / name / "training.json").unlink(missing_ok=True)
        (store.root / name / "adapter_model.safetensors").write_bytes(b"")
        assert client.get("/readyz").json() == {"status": "ok", "artifact": "damaged"}
        assert not ask(PASTS[0])["degraded"], "it serves on from memory"

        process(job, MODEL).suspend()
        slow = ask(PASTS[0])
        assert (slow["ranker"], slow["degraded"]) == ("recommender", True)
        assert_right(PASTS[0], slow)
        process(job, MODEL).kill()
        assert ask(PASTS[1])["degraded"]

        shown = shown_by_ray(job, log.read_text())
        assert len(shown) > 20
        assert [name for name, text in shown.items() if TOKEN in text] == []
        job.send_signal(signal.SIGTERM)
        assert job.wait(300) == 0, log.read_text()
        with pytest.raises(httpx.ConnectError):
            client.get("/healthz")
    assert "Traceback" not in re.sub(r"\(\w+ pid=\d+\).*", "", log.read_text())


def test_a_model_that_answers_otherwise_than_before_does_not_start(
    made: tuple[Store, dict[str, str]],
) -> None:
    store, names = made
    ranker = replace(open_ranker(names["history"], store.location, "fp32")[0], by="catalogue")
    self_test(ranker, store, "fp32")
    self_test(ranker, store, "fp32")
    language = ranker.language
    assert language is not None

    class Other:
        scorer, num_candidates = "catalogue", 0

        def __call__(self, rows: Any) -> Any:
            return np.roll(language(rows), 1, axis=1)

    with pytest.raises(EvaluationError, match="answers otherwise than it did before"):
        self_test(replace(ranker, language=Other()), store, "fp32")
