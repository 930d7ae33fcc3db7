"""What `rsllm serve` refuses before it starts anything."""

from __future__ import annotations

import argparse
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from rsllm.cli import build_parser
from rsllm.compute.layout import Resources
from rsllm.errors import ConfigError
from rsllm.recommend.ranker import Ranker
from rsllm.serve.serve import http_options, room, token_of


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A token, a certificate and a key, as far as flags look at them."""
    for name in ("token", "certificate", "key"):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text("long enough to be a token")
    return {
        f"--{n.replace('token', 'token-file')}": str(tmp_path / n)
        for n in ("token", "certificate", "key")
    }


def flags(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["serve", "stage-2/0d67", "--port", "0", *words])


def test_on_loopback_it_needs_nothing() -> None:
    assert http_options(flags()) == {"host": "127.0.0.1", "port": 0}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "rank.example"])
@pytest.mark.parametrize(
    "given", [[], ["--token-file"], ["--certificate", "--key"], ["--token-file", "--key"]]
)
def test_open_to_others_it_needs_token_and_tls(
    host: str, given: list[str], files: dict[str, str]
) -> None:
    words = [word for name in given for word in (name, files[name])]
    with pytest.raises(ConfigError, match=r"open to others|belong together"):
        http_options(flags("--host", host, *words))


def test_with_both_it_listens_to_others(files: dict[str, str]) -> None:
    words = [word for pair in files.items() for word in pair]
    options = http_options(flags("--host", "0.0.0.0", *words))
    assert options == {
        "host": "0.0.0.0",
        "port": 0,
        "ssl_certfile": files["--certificate"],
        "ssl_keyfile": files["--key"],
    }
    Path(files["--key"]).unlink()
    with pytest.raises(ConfigError, match="there is no file"):
        http_options(flags("--host", "0.0.0.0", *words))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port} cannot be listened to"):
            http_options(flags("--port", str(port)))


def test_the_token_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))
    file, token = token_of(None)
    assert file.read_text().strip() == token
    assert token_of(None) == (file, "")
    assert token_of(file) == (file, "")
    with pytest.raises(ConfigError, match=re.escape(f"no token file {tmp_path / 'other'}")):
        token_of(tmp_path / "other")


def test_cores_and_gpus_are_dealt_out(ranker: Ranker) -> None:
    def dealt(replicas: int, **there: Any) -> dict[str, int]:
        return room(Resources(bf16=False, **there), replicas, [ranker])

    assert dealt(1, cpus=8, gpus=0) == {"cpus": 8, "gpus": 0}
    assert dealt(3, cpus=8, gpus=0) == {"cpus": 2, "gpus": 0}
    assert dealt(2, cpus=8, gpus=2) == {"cpus": 4, "gpus": 1}
    with pytest.raises(ConfigError, match="--replicas 9 needs 9 cores"):
        dealt(9, cpus=8, gpus=0)
