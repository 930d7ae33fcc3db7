"""What is on file as tables (Markdown, LaTeX), figures (SVG, PDF, PNG) and one HTML page."""

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from tabulate import LATEX_ESCAPE_RULES, tabulate

from rsllm.report.report import inert_text, printed, rendered
from rsllm.report.tables import Table, show
from rsllm.study.figures import draw
from rsllm.study.grid import Asked, Grid
from rsllm.study.shown import Shown, gather

DETAILS = ("samples", "seeds", "HR@5", "NDCG@10", "answers", "second", "MRR difference", "p")
"""Columns that a printed page has no room for; page.md has them."""


def missing(shown: Sequence[Shown], left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """What was asked for and is not on file, by data set and reason."""
    found: dict[str, list[str]] = {}
    for part in shown:
        for name in (name for name in part.site.entries if name not in part.cells):
            reason = left_out.get(f"{part.site.name}: {name}") or left_out.get(part.site.name)
            found.setdefault(f"{part.title}, {reason or 'not run yet'}", []).append(name)
    return found


def write_page(folder: Path, grid: Grid, asked: Asked, left_out: Mapping[str, str]) -> str:
    """Write page.html, page.md, tables.tex and, with matplotlib, the figure.

    Returns:
        The tables for the terminal.
    """
    shown = gather(grid, asked)
    known = [part for part in shown if part.cells]
    drawn = draw(known, folder, grid.curves) if known else None
    results: dict[str, Any] = {
        "title": grid.title,
        "question": grid.question,
        "backbone": shown[0].site.experiment.backbone.source,
        "command": again(asked, known),
        "done": f"{sum(len(s.cells) for s in shown)} of {sum(len(s.site.entries) for s in shown)}",
        "missing": missing(shown, left_out),
        "notes": grid.notes,
    }
    figure = drawn and base64.b64encode(drawn.read_bytes()).decode()
    context = {"results": results, "asked": asked, "shown": known, "figure": figure}
    for name in ("page.html", "page.md"):
        page = rendered(Path(__file__).with_name(name), **context, grid=markdown)
        (folder / name).write_text(page, encoding="utf-8")
    papers = [table for part in known for table in (part.methods, part.verdicts) if table.rows]
    (folder / "tables.tex").write_text("\n\n".join(map(latex, papers)) + "\n", encoding="utf-8")
    said = [f"{why}: {'; '.join(names)}" for why, names in results["missing"].items()]
    tables = [printed(table) for part in known for table in part.tables]
    return "\n\n".join([*tables, "\n".join(map(show, said))])


def again(asked: Asked, known: Sequence[Shown]) -> str:
    """The command that trains and judges anew what is shown."""
    names = dict.fromkeys(name for part in known for name in part.cells)
    only = [] if asked.only else [word for name in names for word in ("--only", name)]
    return f"{asked.command} {shlex.join([*only, '--cells'])} NEW_FOLDER"


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
