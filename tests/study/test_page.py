"""Tables, figures and the page, from made-up cells."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up import arguments_for, cell, estimate, put_on_file, small_grid

from rsllm.report.page import latex, markdown
from rsllm.report.tables import Table
from rsllm.store.versions import deciding_results
from rsllm.study.grid import datasets, show, tables_on_file

HOSTILE = (
    r"=1+1 <script>alert(1)</script> | [x](javascript:1) `b` $\frac{$ \input{a} 5% #1 & \x1b[2J"
)


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.names, self.sources, self.text = set[str](), set[str](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_of_strangers_is_inert(tmp_path: Path) -> None:
    grid = small_grid(f"{HOSTILE} a", f"{HOSTILE} b", f"{HOSTILE} c", text=HOSTILE)
    arguments = arguments_for(grid, tmp_path, command=HOSTILE)
    put_on_file(grid, arguments, {f"{HOSTILE} a": 0.4, f"{HOSTILE} b": 0.2})
    show(tmp_path, grid, arguments, {})
    page = Page((tmp_path / "page.html").read_text())
    assert not page.tags & {"script", "iframe", "object", "link", "form"}
    assert not [name for name in page.names if name.startswith("on")]
    assert all(re.match("#[a-z0-9-]+$", source) for source in page.sources)
    assert "<script>alert(1)</script>" in page.text
    written = (tmp_path / "page.md").read_text()
    (code,) = re.findall(r"\n\n    (.*)\n\n", written)
    assert code.startswith(HOSTILE), "a block of code needs no escapes"
    written = written.replace(code, "")
    assert not set("<>`") & set(written)
    assert "](" not in written
    paper = (tmp_path / "tables.tex").read_text()
    commands = set(re.findall(r"(?<!\\)\\([a-z]+)", paper))
    assert not commands & {"frac", "input"}
    figure = (tmp_path / "figure.svg").read_text()
    assert "<script" not in figure


def test_latex_shows_what_stands_there() -> None:
    text = "a_b & 50% #1 {x} $y$"
    table = Table(text, [{"method": "x_1", "HR@1": estimate(0.4)}, {"method": text, "HR@1": None}])
    escaped = r"a\_b \& 50\% \#1 \{x\} \$y\$"
    lines = [re.sub(" +", " ", line.strip()) for line in latex(table).splitlines()]
    assert rf"\caption{{{escaped}}}" in lines
    start = lines.index(r"\toprule")
    assert lines[start - 1] == r"\begin{tabular}{ll}"
    assert lines[start + 1 : start + 6] == [
        r"method & HR@1 \\",
        r"\midrule",
        r"x\_1 & 0.400 [0.350, 0.450] \\",
        rf"{escaped} & - \\",
        r"\bottomrule",
    ]
    strange = latex(Table("\\input{a} ~^<|>", [{"method": "y"}]))
    assert r"\textbackslash{}input\{a\} \textasciitilde{}\^{}" in strange
    cells = [cell.strip() for cell in str(markdown(table)).splitlines()[2].split("|")]
    assert cells == ["", "x_1", "0.400 [0.350, 0.450]", ""]


def test_published_figures_stand_apart(tmp_path: Path) -> None:
    figures = {
        "a": {"HitRatio@1": 0.77, "ValidRatio": 0.9},
        "GPT-4": {"HitRatio@1": "unknown", "ValidRatio": "> 0.969"},
    }
    published = {"LLaRA": {"movielens-100k": figures}}
    grid, without = (small_grid("a", "b", "c", published=each) for each in (published, {}))
    arguments = arguments_for(grid, tmp_path)
    put_on_file(grid, arguments, {"a": 0.4, "b": 0.2})
    (part,), (plain,) = tables_on_file(grid, arguments), tables_on_file(without, arguments)
    assert part.pairs == plain.pairs
    rows = {row["method"]: row for row in part.methods.rows}
    assert list(rows) == ["a", "b", "GPT-4"]
    column = "LLaRA: HitRatio@1 / ValidRatio"
    assert rows["a"].pop(column) == "0.77 / 0.9"
    assert [rows["a"], rows["b"]] == plain.methods.rows
    assert rows["GPT-4"] == {"method": "GPT-4", column: "unknown / > 0.969"}
    assert rows["a"]["HR@1"] == estimate(0.4)
    assert rows["a"]["HitRatio@1"] == estimate(0.31), "of all answers"
    claim, _ = part.pairs
    assert (claim["published gain"], claim["verdict"]) == (0.1, "better here")


def test_the_page_says_what_was_run_and_what_was_not(tmp_path: Path) -> None:
    data = {"here": {}, "there": {"data.seed": 1}, "elsewhere": {"data.seed": 2}}
    grid = small_grid("a", "b", "c", data=data)
    here = arguments_for(grid, tmp_path, data=["here"])
    put_on_file(grid, here, {"a": 0.4, "b": 0.2})
    arguments = arguments_for(grid, tmp_path)
    printed = show(
        tmp_path, grid, arguments, {"there": "it was not imported", "here: c": "no mixture"}
    )
    page = Page((tmp_path / "page.html").read_text()).text
    for text in (printed, page, (tmp_path / "page.md").read_text()):
        words = " ".join(re.findall(r"[a-z;]+", text))
        assert "there it was not imported a; b; c" in words
        assert "elsewhere not run yet a; b; c" in words
        assert "here no mixture c" in words
    for text in (page, (tmp_path / "page.md").read_text()):
        assert "python experiments/made_up.py --only a --only b --cells NEW_FOLDER" in text
    assert "u.item: 0123abcd" in (tmp_path / "page.md").read_text()
    for text in (
        "2 of 9",
        "python experiments/made_up.py",
        "0.400",
        "abc",
        "In these trainings",
        "gamma",
    ):
        assert text in page
    assert {"figure.svg", "figure.pdf", "figure.png"} <= {path.name for path in tmp_path.iterdir()}


def test_each_seed_and_what_is_doubtful_of_it_are_shown(tmp_path: Path) -> None:
    grid = small_grid("a", "b")
    arguments = arguments_for(grid, tmp_path, num_seeds=2)
    put_on_file(grid, arguments, {"a": 0.4, "b": 0.2})
    (dataset,) = datasets(grid, arguments)
    by_seed = {"0": {"HR@1": estimate(0.31)}, "1": {"HR@1": estimate(0.49)}}
    doubts = {"seeds": [0, 1], "by_seed": by_seed, "doubts": [[], ["slots are long"]]}
    dataset.cells.write(dataset.name, dataset.key("a"), "a", cell("a", dataset.key("a"), **doubts))
    printed = show(tmp_path, grid, arguments, {})
    written = re.sub(" +", " ", (tmp_path / "page.md").read_text()).splitlines()
    assert "| a | 0 | 0.310 [0.260, 0.360] |" in written
    assert "| a | 1 | slots are long |" in written
    assert "Intervals are over users and seeds." in " ".join(written)
    assert "slots are long" in printed


def test_a_label_stands_with_the_data(tmp_path: Path) -> None:
    grid = small_grid(
        "a", "b", data={"lastfm": {"data.source": "llara-lastfm", "data.split": "given"}}
    )
    arguments = arguments_for(grid, tmp_path)
    put_on_file(grid, arguments, {"a": 0.4, "b": 0.2})
    assert "lastfm (order artefact)" in show(tmp_path, grid, arguments, {})


def test_a_comparison_of_other_predictions_is_not_shown(tmp_path: Path) -> None:
    grid = small_grid("a", "b")
    arguments = arguments_for(grid, tmp_path)
    put_on_file(grid, arguments, {"a": 0.4, "b": 0.2})
    (part,) = tables_on_file(grid, arguments)
    (path,) = arguments.cells.root.glob(f"*/a-{next(datasets(grid, arguments)).key('a')}.json")
    path.write_text(path.read_text().replace('"scores": [\n   "a"', '"scores": [\n   "other"'))
    (changed,) = tables_on_file(grid, arguments)
    assert [row["verdict"] for row in (*part.pairs, *changed.pairs)] == [
        "better here",
        "better here",
        "not computed",
    ]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, None),
        ({"code": deciding_results() | {"stage-2": 0}}, None),
        ({"code": deciding_results() | {"stage-2": 0}, "backbone": "beef"}, "older"),
        ({"code": deciding_results() | {"recommender": 0}}, "older"),
        ({"code": {"data": deciding_results()["data"]}}, None),
        ({"code": None}, "older"),
    ],
)
def test_what_other_code_filed_is_marked(
    changes: dict[str, Any], shown: str | None, tmp_path: Path
) -> None:
    """A recommender does not depend on the stages of the language model."""
    grid = small_grid("a", "b", "c")
    arguments = arguments_for(grid, tmp_path)
    (dataset,) = datasets(grid, arguments)
    dataset.cells.write(dataset.name, dataset.key("a"), "a", cell("a", dataset.key("a"), **changes))
    (part,) = tables_on_file(grid, arguments)
    assert [row.get("code") for row in part.methods.rows] == [shown]
