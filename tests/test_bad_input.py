"""A mistake costs its user seconds and brings one message, on a script as on a verb."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import jobs
import pytest
from hosts import may_make_networks

from rsllm.cli import main


def refused(command: list[str]) -> str:
    """The one message of a command that is refused, as a process of its own."""
    done = jobs.run(command, seconds=600)
    assert done.returncode == 2, done.stdout + done.stderr
    return the_one_message(done.stdout, done.stderr)


def the_one_message(out: str, err: str) -> str:
    assert "Traceback" not in out + err
    assert err.count("rsllm: error: ") == 1
    return err[err.index("rsllm: error: ") :]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def script(tiny_llm: Path, store: Path) -> list[str]:
    """The tiny job; what follows overrides its flags."""
    return [*jobs.SCRIPT, *jobs.TINY, "--backbone", str(tiny_llm), "--storage", str(store)]


def files(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "movies"], "no asset is called 'movies'; did you mean 'movielens-100k'?"),
        (["--backbone", "nope"], "backbone 'nope' is no local folder"),
        (["--budget", "nope"], "budget 'nope' is unknown; choose one of ['quick'"),
        (["--trials", "0"], "--trials is 0; a study needs at least 1"),
        (["--seeds", "0"], "--seeds is 0; a study needs at least 1"),
        (["--zero-stage", "7"], "compute.zero_stage is 7; it should be 0, 1, 2 or 3"),
    ],
)
def test_script_refuses_flags(
    flags: list[str],
    message: str,
    script: list[str],
    store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert jobs.exit_code(script[1], *script[2:], *flags) == 2
    assert message in the_one_message(*capsys.readouterr())
    assert files(store) == []


@pytest.mark.ray
def test_script_refuses_more_workers_than_cores(
    script: list[str], store: Path, ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.exit_code(script[1], *script[2:], "--workers", "64") == 2
    message = the_one_message(*capsys.readouterr())
    assert "compute.workers is 64, but the cluster has" in message
    assert {file.name for file in files(store)} <= {"optuna.journal"}


def test_script_refuses_storage_below_a_file(script: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused([*script, "--storage", str(tmp_path / "file" / "sub")])
    assert "cannot be written (Not a directory); choose another with --storage" in message


def test_script_refuses_storage_that_is_read_only(script: list[str], store: Path) -> None:
    if reason := may_make_networks():
        pytest.skip(reason)
    store.mkdir()
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    apart = ["unshare", "--mount", "sh", "-c", mount, str(store)]
    message = refused([*apart, *script])
    assert "cannot be written (Read-only file system); choose another with --storage" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stage2.loss.alpha=0.6", "stage2.loss.beta=0.5"], "keep the sum below 1"),
        (["stage2.loss.delta=1"], "no setting 'stage2.loss.delta'"),
        (["stage2.samples=many"], "samples is 'many'; it should be a valid integer"),
    ],
)
def test_cli_refuses_settings(
    settings: list[str], message: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", *flags, "--storage", str(store)]) == 2
    assert message in the_one_message(*capsys.readouterr())
    assert files(store) == []


def test_cli_refuses_a_backbone_that_can_run_code(store: Path, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"model_type": "llama"}')
    (backbone / "pytorch_model.bin").touch()
    command = [*jobs.CLI, "train", "--data", "synthetic", "--backbone", str(backbone)]
    message = refused([*command, "--storage", str(store)])
    assert "has no *.safetensors weights" in message
    assert files(store) == []


@pytest.mark.ray
def test_cli_names_the_broken_line(
    store: Path, tmp_path: Path, ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    items = "".join(f"{number}|Film {number} (1995)" + "|" * 22 + "\n" for number in (1, 2, 3))
    (raw / "u.item").write_text(items)
    (raw / "u.data").write_text(
        "1\t1\t4\t880000000\n1\t2\tgood\t880000060\n1\t3\t4\n1\t9\t4\t880000120\n"
    )
    assert main(["prepare", "--data", str(raw), "--storage", str(store)]) == 1
    message = the_one_message(*capsys.readouterr())
    assert "3 of 7 rows rejected" in message
    assert "bad rating: 'good' in u.data:2; choose a number from 0 to 5" in message
    assert "--set data.max_rejected_rows=3" in message
    (listed,) = files(store)
    assert f"all: {listed}" in message
    assert [json.loads(line)["line"] for line in listed.read_text().splitlines()] == [2, 3, 4]


def test_cli_names_the_column_before_ray_starts(store: Path, tmp_path: Path) -> None:
    raw = tmp_path / "plays.csv"
    raw.write_text("who,what,when,title\nu,1,5,A\n")
    command = [*jobs.CLI, "prepare", "--data", str(raw), "--storage", str(store)]
    message = refused([*command, "--set", "data.table.user=viewer"])
    assert "plays.csv has no column 'viewer'; it has who, what, when, title" in message
    assert "Say which: --set data.table.user=who" in message
    assert files(store) == []


@pytest.mark.ray
def test_ctrl_c_in_training_ends_with_a_hint(
    script: list[str], store: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    endless = ["--set", "recommender.max_epochs=1000", "--set", "recommender.patience=1000"]
    with jobs.started([*script, *endless], log) as job:
        jobs.wait_until(lambda: list(store.glob("running/recommender-*/*")), job, log)
        job.send_signal(signal.SIGINT)
        try:
            code = job.wait(timeout=300)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running long after Ctrl-C:\n{log.read_text()}")
    shown = log.read_text()
    assert code == 130, shown
    assert "rsllm: interrupted; the same command continues" in shown
    assert "Traceback" not in shown
    assert list(store.glob("recommender/[0-9a-f]*")) == []
