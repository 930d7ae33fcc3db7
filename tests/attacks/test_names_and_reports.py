"""Text of strangers as names and in reports, secrets of the user, libraries with known holes."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_data import small_data

import rsllm
from rsllm import Pipeline, replace_in
from rsllm.cli import SAFE_FROM, main
from rsllm.config import Experiment, RecommenderConfig
from rsllm.config.presets import preset
from rsllm.data.audit import audit, table
from rsllm.data.prepared import PreparedData
from rsllm.errors import ConfigError
from rsllm.flags import Budget, parse
from rsllm.report.page import terminal_tables, write_report
from rsllm.report.tables import show
from rsllm.store.artifacts import Store, provenance
from rsllm.study.external import export_candidates

ROOT = Path(__file__).parents[2]
SECRET = "a-token-that-nobody-may-see"
HOSTILE = (
    "=cmd|' /C calc'!A0",
    "+1+cmd",
    "@SUM(1)",
    "-2+3",
    "\t=1+1",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><a href="javascript:alert(1)">',
    "a | `b` | [c](javascript:alert(1))",
    "\x1b]0;title\x07\x1b[2J",
)
ELSEWHERE = ("../../x", "/etc/x", "..", ".", "a/b", "a\\b", "a\0b", "~/x", "x" * 65, "-x", "a b")


def results(text: str) -> dict[str, Any]:
    """A study that failed, with `text` wherever text goes."""
    trial = {"number": 0, "state": "failed", "parameters": {text: text}, "samples": 0}
    trial |= {"seconds": 0.0, "curve": [], "error": text, "MRR": None, "HR@1": None}
    search = {"metric": "MRR", "split": "validation", "n": 9, "best": 0, "p_beats_chance": None}
    return {
        "title": text,
        "question": text,
        "backbone": text,
        "budget": {text: text},
        "data": {"source": text},
        "experiment": {text: {text: text}},
        "provenance": provenance(),
        "trials": [trial],
        "search": search | {"chance": None},
        "methods": [],
        "pairs": [],
        "recommender": {},
        "notes": [text],
    }


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), dict[str, str](), ""
        self.links = set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name: value or "" for name, value in attrs}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_reports_is_inert(text: str, tmp_path: Path) -> None:
    write_report(tmp_path, results(text))
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert not page.tags & {"script", "img", "iframe", "object", "link", "form"}
    assert all(re.fullmatch("#[a-z]+", link) for link in page.links)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "default-src 'none'" in page.attributes["content"]
    assert text.strip() in page.text or show(text).strip() in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert not set("<>`") & set(markdown)
    assert not re.search(r"\]\(|\x1b", markdown)
    with (tmp_path / "trials.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert sum(text in cell for cell in cells) == 3
    assert not [cell for cell in cells if cell.lstrip()[:1] in set("=+-@")]
    assert "\x1b" not in terminal_tables(results(text))


def test_titles_in_exported_sets_are_inert(tmp_path: Path) -> None:
    """In CSV, which spreadsheets open; Parquet keeps them as they are."""
    data = small_data(tmp_path / "data")
    titles = [HOSTILE[n % 4] for n in range(len(data.titles))]
    hostile = PreparedData(data.path, titles, data.source_ids, data.catalogue, data.facts)
    path = export_candidates(hostile, "validation", tmp_path / "sets.csv")
    with path.open(newline="") as file:
        found = {row["title"] for row in csv.DictReader(file)}
    assert found == {f"'{title}" for title in HOSTILE[:4]}
    path = export_candidates(hostile, "validation", tmp_path / "sets.parquet")
    assert set(pq.read_table(path)["title"].to_pylist()) == set(HOSTILE[:4])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    """Or are refused before anything is written."""
    with pytest.raises(ConfigError, match="run_name is "):
        Pipeline(Experiment(), tmp_path / "store", run_name=name)
    with pytest.raises(ConfigError, match="choose one of gru4rec, caser, sasrec"):
        replace_in(Experiment(), preset(name, "synthetic"))
    with pytest.raises(ConfigError, match="choose one of gru4rec, caser, sasrec"):
        RecommenderConfig(model=name)
    assert list(tmp_path.iterdir()) == []
    store = Store.open(tmp_path / "store")
    path = store.get("data", {"source": name}, lambda folder: (folder / "a").touch())
    assert path.parent == tmp_path / "store" / "data"
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_variants_are_chosen_from_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--only", "../../x", "--storage", str(tmp_path / "store")]
    monkeypatch.setattr("sys.argv", ["script", *flags])
    with pytest.raises(SystemExit) as refused:
        parse("", {"quick": Budget(summary="")}, Experiment(), variants=["plain"])
    assert refused.value.code == 2
    assert "invalid choice: '../../x'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_output_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Artifact, manifest, report and terminal; test_open_ports.py searches what Ray writes."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    print(table(audit(small_data(tmp_path / "data").path)))
    store = Store.open(tmp_path / "store")
    store.get("report", {}, lambda folder: write_report(folder, results("x")))
    assert (main(["fetch"]), main(["fetch", "nothing"])) == (0, 2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"manifest.json", "results.json", "trials.csv", "report.html"} < {p.name for p in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    shown = capsys.readouterr()
    assert "no asset is called 'nothing'" in shown.err
    assert SECRET not in shown.out + shown.err


@pytest.mark.parametrize(("library", "old"), [("torch", "2.9.1+cpu"), ("ray", "2.53.0")])
def test_a_library_with_known_holes_is_refused(library: str, old: str, tmp_path: Path) -> None:
    """Seen by its metadata, before it is imported."""
    folder = tmp_path / f"{library}-{old}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {old}\n")
    code = "import sys; from rsllm.cli import main; code = main(['fetch'])\n"
    code += "print(code, *{'torch', 'ray'} & set(sys.modules))"
    paths = os.pathsep.join([str(tmp_path), str(Path(rsllm.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2"]
    assert f"rsllm: error: {library} {old} is unsafe" in done.stderr
    assert "CVE-" in done.stderr


def test_what_is_checked_at_start_is_what_the_package_asks_for() -> None:
    """Its own floors are at least as high."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = (re.match(r"([\w-]+)(?:\[.*\])?>=(\d+)\.(\d+)", d) for d in project["dependencies"])
    floors = {m[1]: (int(m[2]), int(m[3])) for m in found if m}
    assert SAFE_FROM.keys() >= {"torch", "ray"}
    assert all(floors[library] >= floor for library, (floor, _) in SAFE_FROM.items())
