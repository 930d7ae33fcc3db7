"""The pages that people read: their size, where their links lead, and what their commands name."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from rsllm.cli import build_parser
from rsllm.config import Experiment
from rsllm.config.plain import parse_setting, replace_in
from rsllm.settings import all_settings

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / page
    for page in (
        *("README.md", "CONTRIBUTING.md", "SECURITY.md", "cluster/README.md"),
        *("experiments/README.md", "experiments/results/README.md", "experiments/LOG.md"),
        *("rsllm/README.md", "rsllm/data/README.md", "rsllm/recommenders/README.md"),
        *("rsllm/serve/README.md", "tests/attacks/README.md", "tests/faults/README.md"),
    )
]
COMMAND = re.compile(r"(?:^    (?!  )|`)(?:\S*/)?rsllm ([a-z][^`\n]*)", re.MULTILINE)
WORDS = (
    *("study", "trial", "twin", "claim", "verdict", "group", "cell", "artifact", "key", "stage"),
    *(
        "slot",
        "marker",
        "candidate",
        "draw",
        "ranker",
        "as deployed",
        "scorer",
        "choice prompt",
        "history prompt",
    ),
    *("catalogue scorer", "pointer", "shortcut", "fold", "pool"),
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Where a link may lead in a page, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link or link == "results/...":  # the second is the form of an entry of the log
            continue
        assert target.exists(), f"{name(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_there(page: Path) -> None:
    """Verbs and flags wherever they stand; scripts and settings of the indented lines of a page."""
    text = page.read_text()
    for command in COMMAND.findall(text):
        _check_flags(command.split("  #")[0])
    for line in re.findall(r"^    (?!  )(.+)$", text, re.MULTILINE):
        command = line.split("   #")[0]
        for script in re.findall(r"\bexperiments/[\w/]+\.py", command):
            assert (ROOT / script).exists(), line
        for setting in re.findall(r"--set (\S+=\S+)", command):
            replace_in(Experiment(), dict([parse_setting(setting)]))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_are_there(page: Path) -> None:
    """Paths of settings, or the beginnings of several, in the sentences and tables of a page."""
    paths = [one.path for one in all_settings()]
    for path in re.findall(r"`([a-z0-9]+\.[a-z0-9_.]*[a-z0-9_])(?:=[^`]*)?`", page.read_text()):
        section, _, ending = path.partition(".")
        if ending != "safetensors" and any(one.startswith(f"{section}.") for one in paths):
            assert any(f"{one}.".startswith(f"{path}.") for one in paths), path


def _check_flags(command: str) -> None:
    """Its verb is there, and that verb, or the one below it, has its flags."""
    parser = build_parser()
    for word in command.split():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert word in action.choices, f"rsllm {command}"
                parser = action.choices[word]
        if word.startswith("--"):
            assert word.split("=")[0] in parser._option_string_actions, f"rsllm {command}"


@pytest.mark.parametrize(("page", "most"), [("README.md", 150), ("experiments/README.md", 130)])
def test_first_pages_stay_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= most


def test_every_script_has_its_line() -> None:
    text = (ROOT / "experiments" / "README.md").read_text()
    assert [p.name for p in (ROOT / "experiments").glob("*.py") if f"({p.name})" not in text] == []


def test_glossary() -> None:
    text = (ROOT / "rsllm" / "README.md").read_text()
    rows = re.findall(r"^\| ([a-z ]+) \| ", text.partition("## Glossary")[2], re.MULTILINE)
    assert rows == ["word", *WORDS]


def test_the_first_python_of_a_reader() -> None:
    """The settings of the README's example are there, and its methods too."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "Pipeline" in block)
    tree = ast.parse(block)
    assert len(block.strip().splitlines()) <= 8
    (settings,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    replace_in(Experiment(), ast.literal_eval(settings))
    from rsllm import Pipeline

    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods = [f.attr for f in calls if isinstance(f, ast.Attribute)]
    assert methods
    assert all(callable(getattr(Pipeline, method)) for method in methods)
