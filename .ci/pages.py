"""Finds the pages of the site that `mkdocs.yml` describes, and makes those that no file holds.

A page keeps the path that it has in the repository, so a link between READMEs is right in both.
Whatever a page links to is in the site too: pictures and results as they are, code on a page.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from rsllm.cli import build_parser
from rsllm.settings import Setting, all_settings

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
CODE = {".py": "python", ".toml": "toml", ".yaml": "yaml"}
PYTHON = {
    "Recommend": {
        "rsllm.load": [],
        "rsllm.recommend.ranker.Ranker": ["recommend", "rank", "similar", "explain"],
    },
    "Train": {
        "rsllm.Experiment": [],
        "rsllm.replace_in": [],
        "rsllm.Pipeline": ["prepare", "fit", "train_keys", "train_text", "train"],
        "rsllm.fetch": [],
    },
    "Add a recommender": {
        "rsllm.recommenders.base.Recommender": ["forward", "scores", "embed", "item_table"],
    },
    "Add a layout of raw files": {
        "rsllm.data.sources.RawLayout": ["patterns"],
        "rsllm.data.files.TableFormat": [],
    },
    "Losses": {
        "rsllm.model.losses.next_item_loss": [],
        "rsllm.model.losses.contrast": [],
        "rsllm.model.losses.ranking_loss": [],
    },
    "Rank the whole catalogue": {"rsllm.evaluate.scorers.CatalogueScorer": []},
}
"""What a program may lean on, and the members that are shown."""
WIDE = """
.md-grid { max-width: 74rem; }
.md-typeset table:not([class]) :is(th, td) { min-width: 0; padding: 0.6em 0.9em; }
.md-typeset table:not([class]) td:first-child code { white-space: nowrap; }
"""
"""Tables of ten columns find room, and a setting's name stands on one line."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put pages, and whatever they link to, in the place of what mkdocs found by itself."""
    found = Files([file for file in files if file.src_dir != config.docs_dir])
    for name, make in MADE.items():
        found.append(File.generated(config, name, content=make()))
    for path in sorted(reached({ROOT / page for page in pages_in(config.nav)})):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in CODE:
            text = code(name, path.read_text(), CODE[path.suffix])
            found.append(File.generated(config, f"{name}.md", content=text))
        else:
            found.append(File.generated(config, name, abs_src_path=str(path)))
    return found


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of code and of folders; of one to a bare folder, keep the text."""
    if page.file.src_uri.startswith("experiments/"):
        # Who searches for a word wants to know what it means, and then what came of it.
        page.meta.setdefault("search", {"boost": 1e-4})

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found[1], found[2], found[3] or ""
        target = target_of(ROOT / page.file.src_uri, path)
        if not target.is_file():
            return text if target.is_dir() else found[0]
        name = os.path.relpath(target, ROOT / Path(page.file.src_uri).parent)
        return f"[{text}]({name}{'.md' if target.suffix in CODE else ''}{anchor})"

    return LINK.sub(link, markdown)


def pages_in(nav: Any) -> Iterator[str]:
    """The pages of a navigation that are files of the repository."""
    if not isinstance(nav, str):
        for below in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_in(below)
    elif (ROOT / nav).is_file():
        yield nav


def reached(pages: set[Path]) -> set[Path]:
    """Pages, and all files that links lead to from there."""
    files, new = set(pages), pages
    while new:
        texts = {page: page.read_text() for page in new if page.suffix == ".md"}
        links = {target_of(page, m[2]) for page, text in texts.items() for m in LINK.finditer(text)}
        new = {path for path in links - files if path.is_file() and path.is_relative_to(ROOT)}
        files |= new
    return files


def target_of(page: Path, link: str) -> Path:
    """Where a link leads to; in a folder to its README, if it has one."""
    target = (page.parent / link).resolve()
    readme = target / "README.md"
    return readme if readme.is_file() else target


def code(name: str, text: str, language: str) -> str:
    """A page of code, which the search leaves out."""
    # Tildes, because docstrings hold backticks.
    shown = f"# {name}\n\n~~~~ {language}\n{text}\n~~~~\n"
    return f"---\nsearch:\n  exclude: true\n---\n{shown}"


def commands() -> str:
    """Every verb's help, as it is printed."""
    parts = ["# Commands\n"]
    for parser in verbs():
        # Lines would be as long as the terminal's.
        parser.formatter_class = partial(parser.formatter_class, width=98)
        parts.append(f"## {parser.prog}\n\n~~~~ text\n{parser.format_help()}~~~~\n")
    return "\n".join(parts)


def verbs() -> Iterator[argparse.ArgumentParser]:
    """The parsers of all verbs, and of the verbs below them."""
    waiting = [build_parser()]
    while waiting:
        parser = waiting.pop(0)
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        waiting = [*(choice for action in below for choice in action.choices.values()), *waiting]
        yield parser


def settings() -> str:
    """A table of every section of an `Experiment`."""
    parts = ["# Settings\n", "[How they are given](rsllm/README.md#settings)\n"]
    for section, ones in groupby(all_settings(), lambda one: one.path.split(".")[0]):
        parts += [f"\n## {section}\n", "| --set | default | may be | what it does |"]
        parts += ["| --- | --- | --- | --- |", *map(row, ones)]
    return "\n".join(parts)


def row(one: Setting) -> str:
    """A setting as a row of a table."""
    default = one.default if isinstance(one.default, str) else json.dumps(one.default)
    shown = f"`{default}`" if default else "empty"
    cells = [shown, *(html.escape(text, quote=False) for text in (one.choices, one.about))]
    return " | ".join([f"| `{one.path}`", *(cell.replace("|", r"\|") for cell in cells), ""])


def python() -> str:
    """Directives by which mkdocstrings shows the docstrings of `PYTHON`."""
    parts = ["# Python\n"]
    for heading, names in PYTHON.items():
        parts.append(f"## {heading}\n")
        for name, members in names.items():
            options = f"    options:\n      members: {json.dumps(members)}\n" if members else ""
            parts.append(f"::: {name}\n{options}")
    return "\n".join(parts)


MADE = {
    "commands.md": commands,
    "settings.md": settings,
    "python.md": python,
    "wide.css": lambda: WIDE,
}
