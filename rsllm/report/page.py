"""Results as files: a self-contained HTML page, Markdown, CSV, LaTeX and figures.

Titles, names and errors come from data and are inert everywhere: escaped in HTML and Markdown,
quoted in CSV, stripped of control characters in the terminal.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from tabulate import LATEX_ESCAPE_RULES, tabulate

from rsllm.evaluate.metrics import brief_metrics
from rsllm.report import figures, tables
from rsllm.report.datasets import DatasetTables
from rsllm.report.figures import Curves
from rsllm.report.tables import OLD_WORDS, Results, Table, inert, show
from rsllm.report.templates import inert_text, render
from rsllm.store.artifacts import write_json

NOTES = tomllib.loads(Path(__file__).with_name("notes.toml").read_text())
DETAILS = ("samples", "seeds", "HR@5", "NDCG@10", "answers", "metric", "second", "p")
"""Columns that a printed page has no room for; page.md has them."""


def write_report(folder: Path, results: Results, recommend: str = "") -> str:
    """Write results.json, report.html, report.md, trials.csv and methods.csv.

    Args:
        folder: where; it must exist.
        results: of a study, see `rsllm.study.study`; `confirm`, `seeds`, `by_seed` of methods and
            `objectives` of trials may be missing.
        recommend: the command that recommends with its best model.

    Returns:
        The tables for the terminal.
    """
    write_json(folder / "results.json", results)
    trials = [{**trial, **trial["parameters"]} for trial in results["trials"]]
    _write_csv(folder / "trials.csv", trials, leave_out=["parameters", "curve"])
    _write_csv(folder / "methods.csv", list(map(_method_row, results["methods"])))
    pairs = [{**p, "verdict": OLD_WORDS.get(p["verdict"], p["verdict"])} for p in results["pairs"]]
    results = {**results, "pairs": pairs}
    kind = "variants" if any("name" in trial for trial in trials) else "trials"
    data, minutes = results["data"], results["budget"].get("minutes")
    source = (results["experiment"].get("data") or data).get("source", data.get("source"))
    origin = results["provenance"]
    facts = {
        "Data": source and f"{source}, {data['items']} items" if "items" in data else source,
        "Backbone": results["backbone"],
        "Trained": f"{len(trials)} {kind}" + (f" in {minutes} minutes" if minutes else ""),
        "Made": " ".join([origin.get("time", "")[:10], origin.get("machine", "")]).strip(),
    }
    quality = (tables.methods, tables.deployed, tables.by_seed, tables.by_target)
    answers = (tables.likelihoods, tables.generated, tables.orders)
    training = (tables.confirm, figures.of_training, figures.of_trials, tables.mattered)
    sections = {
        "Methods": (figures.of_methods, *quality, *answers, tables.recommender),
        "Comparisons": (tables.pairs,),
        kind.capitalize(): (*training, tables.trials, tables.front, tables.health),
        "Cost": (tables.cost,),
    }
    _write(
        folder / "report",
        results,
        facts=facts,
        recommend=recommend,
        verdicts=[results],
        sections={name: [make(results) for make in makers] for name, makers in sections.items()},
        notes=[*results["notes"], *filter(None, [results.get("layout")])],
        details={part: results[part] for part in ("budget", "data", "experiment", "provenance")},
    )
    return terminal_tables(results)


def write_page(
    folder: Path, results: Results, parts: Sequence[DatasetTables], curves: Curves
) -> str:
    """Write page.html, page.md, tables.tex and the figure of a grid.

    Args:
        folder: where; it must exist.
        results: title, question, facts, command and notes.
        parts: its data sets.
        curves: what the figure shows instead of a row per entry.

    Returns:
        The tables for the terminal.
    """
    known = [part for part in parts if part.cells]
    done = f"{sum(len(p.cells) for p in parts)} of {sum(len(p.entries) for p in parts)}"
    reasons: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        for name, reason in part.missing.items():
            reasons.setdefault((part.title, reason), []).append(name)
    rows = [{"data": d, "reason": r, "methods": "; ".join(n)} for (d, r), n in reasons.items()]
    missing = Table("Not run", rows)
    drawn = []
    if known:
        fill = figures.of_grid(known, curves)
        figures.write_figure(folder, fill)
        drawn = [figures.inline(f"{figures.METRIC} with 95 % intervals", fill)]
    details = {}
    for part in known:
        first = next(iter(part.cells.values()))
        origin = {"data": first["data"], "versions": first["provenance"]}
        details[part.title] = {**origin, "common": part.common, "settings": part.settings}
    _write(
        folder / "page",
        results,
        facts={**results["facts"], "Cells on file": done},
        recommend="",
        verdicts=[{"about": f"{part.title}: {part.about}", "pairs": part.pairs} for part in known],
        sections={
            "Methods": [*drawn, *(table for part in known for table in part.tables)],
            "Not run": [missing],
        },
        notes=[NOTES["words"], *results["notes"]],
        details=details,
    )
    papers = [table for part in known for table in (part.methods, part.claims) if table]
    (folder / "tables.tex").write_text("\n\n".join(map(latex, papers)) + "\n", encoding="utf-8")
    every = [table for part in known for table in part.tables] + [missing]
    return "\n\n".join(as_text(table) for table in every if table)


def terminal_tables(results: Results) -> str:
    """The trials, if there are any, the methods and the paired tests, for the terminal."""
    search = (tables.recommender, tables.trials, tables.front) if "search" in results else ()
    methods = partial(tables.methods, only=brief_metrics())
    others = (tables.confirm, methods, tables.generated, tables.orders, tables.pairs)
    every = [make(results) for make in (*search, *others)]
    return "\n\n".join(as_text(table) for table in every if table)


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


def _write(
    path: Path, results: Results, sections: Mapping[str, Sequence[Any]], **context: Any
) -> None:
    """Write a page as HTML and as Markdown, which has no figures; what is empty is left out."""
    kept = {name: some for name, parts in sections.items() if (some := [*filter(None, parts)])}
    tools = {"tables": tables, "grid": markdown, "texts": NOTES}
    for kind in ("html", "md"):
        text = render(f"page.{kind}", results=results, sections=kept, **context, **tools)
        path.with_suffix(f".{kind}").write_text(text, encoding="utf-8")


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
