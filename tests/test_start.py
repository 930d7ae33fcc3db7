"""`rsllm start`: what it understands of a made-up table, and what it makes of it on yes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import jobs
import pytest

from rsllm.cli import main
from rsllm.config import Experiment
from rsllm.config.plain import read_settings, replace_in
from rsllm.pipeline import Pipeline
from rsllm.settings import settings_like
from rsllm.start import fitting

USERS, ITEMS, PLAYS = 30, 25, 12


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    """Thirty listeners of songs, under a shop's own names of columns."""
    path = tmp_path / "plays.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "song_id", "timestamp", "title"])
        for user in range(USERS):
            for play in range(PLAYS):
                item, day = (3 * user + play * play) % ITEMS, 1 + play
                rows.writerow([f"u{user}", item, f"2024-02-{day:02}T10:00:00Z", f"Song No {item}"])
    return path


def words(plays: Path, *more: str) -> list[str]:
    named = ["--set", "data.table.item=song_id"]
    return ["start", str(plays), "--storage", str(plays.with_name("store")), *named, *more]


def test_it_says_what_it_understands_and_computes_nothing_without_a_yes(
    plays: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer in ("", "n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert main(words(plays)) == 0
        shown = capsys.readouterr().out
        assert f"{USERS * PLAYS} rows of {USERS} users and {ITEMS} items" in shown
        assert "user is user_id, item is song_id, time is timestamp, title is title" in shown
        assert "from 2024-02-01 to 2024-02-12" in shown
        assert "Song No 0; Song No 1" in shown
        assert "rsllm train --config" in shown
        assert "Nothing was computed" in shown
    assert not list(plays.with_name("store").glob("**/*.toml"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("who,what\n1,2\n", "plays.csv has no column 'song_id'; it has who, what"),
        ("user_id,song_id,timestamp,title\n", "plays.csv has no usable row"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(
    plays: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plays.write_text(content)
    assert main(words(plays, "--yes")) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rsllm: error: ")
    assert said in line
    assert main(words(plays.with_name("none.csv"))) == 2
    assert "none.csv is no file or folder with raw data" in capsys.readouterr().err


def test_a_small_catalogue_gets_small_candidate_sets() -> None:
    usual = Experiment().data
    assert fitting([f"{n}" for n in range(usual.window + usual.num_candidates)], usual) == {}
    for count in (6, 25):
        smaller = fitting([f"{n}" for n in range(count)] * 2, usual)
        data = replace_in(Experiment(), smaller).data
        assert data.window + data.num_candidates <= count


@pytest.mark.ray
def test_from_a_table_to_recommendations_and_a_report(
    plays: Path, tiny_llm: Path, trained_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for p, v in jobs.SETTINGS.items() for word in ("--set", f"{p}={v}")]
    assert main(words(plays, "--yes", "--backbone", str(tiny_llm), *settings)) == 0
    shown, store = capsys.readouterr().out, plays.with_name("store")
    (report,) = store.glob("studies/start-with-plays-csv-*/report.html")
    assert f"report: {report}" in shown
    table = shown.rpartition("-----")[2].strip().splitlines()
    assert len(table) == 5
    assert all("Song No " in line for line in table)
    (model,) = store.glob("stage-2/*/manifest.json")
    # The commands that it shows, and the model's own settings, mean the model that it made.
    asked = [
        replace_in(Experiment(), read_settings(store / "start-plays.toml")),
        replace_in(Experiment(), settings_like(str(model.parent), store)),
        replace_in(Experiment(), settings_like(report.parent.name, store)),
    ]
    for experiment in asked:
        assert Pipeline(experiment, store).finished() == model.parent


def test_other_names_of_columns(plays: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--config` says them as `--set` does."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    config = plays.with_name("mine.toml")
    config.write_text('[data.table]\nitem = "song_id"\n')
    storage = str(plays.with_name("store"))
    assert main(["start", str(plays), "--config", str(config), "--storage", storage]) == 0
    assert "item is song_id" in capsys.readouterr().out
