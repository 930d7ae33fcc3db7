"""Results as files: a self-contained HTML page, Markdown, CSV, LaTeX and figures.

Titles, names and errors come from data and are inert everywhere: escaped in HTML and Markdown,
quoted in CSV, stripped of control characters in the terminal.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tabulate import LATEX_ESCAPE_RULES, tabulate

import rsllm.report.tables as made
from rsllm.evaluate.metrics import brief_metrics
from rsllm.report import plots
from rsllm.report.datasets import DatasetTables
from rsllm.report.figures import Curves, draw
from rsllm.report.tables import Results, Table, inert, show
from rsllm.store.artifacts import write_json

DETAILS = ("samples", "seeds", "HR@5", "NDCG@10", "answers", "metric", "second", "p")
"""Columns that a printed page has no room for; page.md has them."""


def write_report(folder: Path, results: Results) -> None:
    """Write results.json, report.html, report.md, trials.csv and methods.csv.

    Args:
        folder: where; it must exist.
        results: of a study, see `rsllm.study.study`; `confirm`, `seeds`, `by_seed` of methods and
            `objectives` of trials may be missing.
    """
    write_json(folder / "results.json", results)
    trials = [{**trial, **trial["parameters"]} for trial in results["trials"]]
    _write_csv(folder / "trials.csv", trials, leave_out=["parameters", "curve"])
    _write_csv(folder / "methods.csv", list(map(_method_row, results["methods"])))
    results = {**results, "pairs": made.in_todays_words(results["pairs"])}
    for name in ("report.html", "report.md"):
        page = render(Path(__file__).with_name(name), results=results)
        (folder / name).write_text(page, encoding="utf-8")


def write_page(
    folder: Path, results: Results, parts: Sequence[DatasetTables], curves: Curves | None
) -> str:
    """Write page.html, page.md, tables.tex and, with matplotlib, the figure of a grid.

    Args:
        folder: where; it must exist.
        results: title, question, backbone, budget, settings, num_seeds, command and notes.
        parts: its data sets.
        curves: see `draw`.

    Returns:
        The tables for the terminal.
    """
    known = [part for part in parts if part.cells]
    missing: dict[str, list[str]] = {}
    for part in parts:
        for name, reason in part.missing.items():
            missing.setdefault(f"{part.title}, {reason}", []).append(name)
    done = f"{sum(len(p.cells) for p in parts)} of {sum(len(p.entries) for p in parts)}"
    figure = draw(known, folder, curves) if known else ""
    context = {
        "results": {**results, "done": done, "missing": missing},
        "shown": known,
        "figure": base64.b64encode(figure.encode()).decode(),
    }
    for name in ("page.html", "page.md"):
        page = render(Path(__file__).with_name(name), **context, grid=markdown)
        (folder / name).write_text(page, encoding="utf-8")
    papers = [table for part in known for table in (part.methods, part.claims) if table.rows]
    (folder / "tables.tex").write_text("\n\n".join(map(latex, papers)) + "\n", encoding="utf-8")
    told = [show(f"{why}: {'; '.join(names)}") for why, names in missing.items()]
    return "\n\n".join([as_text(table) for part in known for table in part.tables] + told)


def tables(results: Results) -> str:
    """The trials, if there are any, the methods and the paired tests, for the terminal."""
    of_trials = (made.recommender, made.trials, made.front)
    searched = [make(results) for make in of_trials] if "search" in results else []
    methods = [
        made.methods(results, brief_metrics()),
        made.generated(results),
        made.orders(results),
    ]
    shown = [*searched, made.confirm(results), *methods, made.pairs(results)]
    return "\n\n".join(as_text(table) for table in shown if table.rows)


def as_text(table: Table) -> str:
    """For the terminal."""
    header = list(map(show, table.header))
    return f"{show(table.title)}\n{tabulate(table.cells(show), header, disable_numparse=True)}"


def markdown(table: Table) -> Markup:
    """For Markdown, where text stays text."""
    header = [inert_text(name) for name in table.header]
    return Markup(tabulate(table.cells(inert_text), header, "github", disable_numparse=True))


def latex(table: Table) -> str:
    """For LaTeX with booktabs and graphicx, as wide as a page can show."""
    kept = [{n: v for n, v in row.items() if n not in DETAILS} for row in table.rows]
    table = replace(table, rows=kept)
    body = tabulate(table.cells(show), table.header, "latex_booktabs", disable_numparse=True)
    title = "".join(LATEX_ESCAPE_RULES.get(char, char) for char in show(table.title))
    box = f"\\resizebox{{\\textwidth}}{{!}}{{%\n{body}}}"
    return f"\\begin{{table}}\n\\caption{{{title}}}\n{box}\n\\end{{table}}"


def _write_csv(path: Path, rows: Sequence[Any], leave_out: Sequence[str] = ()) -> None:
    table = pd.DataFrame(rows, dtype=object).drop(columns=leave_out, errors="ignore")
    table.map(inert).rename(columns=inert).to_csv(path, index=False)


def _method_row(method: Mapping[str, Any]) -> dict[str, Any]:
    """Each metric and the ends of its interval in columns of their own."""
    return {key: method[key] for key in ("name", "scorer", "n", "seconds")} | {
        f"{metric}{suffix}": estimate[end]
        for metric, estimate in method["metrics"].items()
        for suffix, end in {"": "value", " low": "low", " high": "high"}.items()
    }


def inert_text(value: Any) -> Markup:
    """Text of which neither HTML nor Markdown makes a tag, a link or a cell."""
    if isinstance(value, Markup | Mapping):
        return Markup(value if isinstance(value, Markup) else show(value))
    return Markup(re.sub(r"[<>&\"|`\[\]\\*~]", lambda char: f"&#{ord(char[0])};", show(value)))


def render(template: Path, **context: Any) -> str:
    """A template filled in, all text inert; it may include its neighbours and those here."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        finalize=inert_text,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template.name).render(made=made, plots=plots, **context)
