"""A grid of data sets, entries and claims, and the command line that fills and shows it."""

import argparse
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsllm.config import Experiment
from rsllm.config.plain import flat, replace_in, to_dict
from rsllm.config.presets import preset
from rsllm.flags import Budget, budget_and_storage, default_budget, make_parser, overrides
from rsllm.report.datasets import DatasetTables
from rsllm.report.page import write_page
from rsllm.store.artifacts import Store
from rsllm.study import paper
from rsllm.study.claims import Claim, compare_cells
from rsllm.study.results import Cell, Cells, Entry, results_folder, slug

Published = Mapping[str, Mapping[str, Mapping[str, float | str]]]
"""Metrics of a publication, by data set and entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A question, answered by every entry on every data set, and claims about them."""

    title: str
    question: str
    base: Experiment
    entries: Callable[[Experiment], Sequence[Entry]]
    """Of one data set's experiment under the budget; names do not depend on it."""
    claims: Sequence[Claim] = ()
    published: Mapping[str, Published] = field(default_factory=dict)
    """Figures of others, by what they are called; they are shown, and never computed with."""
    budgets: Mapping[str, Budget] = field(default_factory=lambda: paper.BUDGETS)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: paper.DATA)
    """Data sets by name, as paths into `Experiment`."""
    notes: Sequence[str] = ()
    curves: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """What the figure shows instead of a line per entry: by what was spent, as cells name it
    (samples, seconds, tokens, trainable), curves of HR@1 by name, through these entries."""

    @property
    def names(self) -> list[str]:
        """The entries' names."""
        return [entry.name for entry in self.entries(self.base)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GridArguments:
    """The parts of a grid that the user chose, and where its cells lie."""

    budget_name: str
    budget: Budget
    settings: Mapping[str, Any]
    """Paths into `Experiment` that the user set."""
    data: Sequence[str]
    only: Sequence[str]
    num_seeds: int
    storage: str
    cells: Cells
    command: str
    """What repeats it, from nothing but the code and the data."""
    render: bool


@dataclass(frozen=True, slots=True)
class Dataset:
    """One data set of a grid, as it was asked for."""

    name: str
    experiment: Experiment
    entries: Mapping[str, tuple[Entry, Experiment]]
    """By name, with its own experiment."""
    num_seeds: int
    cells: Cells

    @property
    def seeds(self) -> range:
        """Those of what is trained last: stage 2, or a recommender by itself."""
        first = self.experiment.stage2.seed
        return range(first, first + self.num_seeds)

    def key(self, name: str) -> str:
        """The key of an entry's cell."""
        entry, experiment = self.entries[name]
        return entry.key(experiment, self.seeds)

    def cell(self, name: str) -> Cell | None:
        """An entry's cell, if it was asked for and is on file."""
        return self.cells.read(self.name, self.key(name)) if name in self.entries else None


def datasets(grid: Grid, arguments: GridArguments) -> Iterator[Dataset]:
    """The data sets; one that equals an earlier one under these settings is left out."""
    seen: list[Experiment] = []
    for name in arguments.data:
        own = grid.data.get(name, {"data.source": name})
        chosen = arguments.settings
        experiment = replace_in(grid.base, {**arguments.budget.overrides, **own, **chosen})
        if experiment in seen:
            continue
        seen.append(experiment)
        entries = {}
        for entry in grid.entries(experiment):
            if entry.name in (arguments.only or grid.names):
                # Its recommender is as tuned for the data unless the user says otherwise.
                model = entry.settings.get("recommender.model", experiment.recommender.model)
                settings = {**preset(model, experiment.data.source), **chosen, **entry.settings}
                entries[entry.name] = (entry, replace_in(experiment, settings))
        yield Dataset(name, experiment, entries, arguments.num_seeds, arguments.cells)


def parse(grid: Grid, description: str, script: Path) -> GridArguments:
    """Read the flags; without --render a Ray is looked for where no budget was named.

    Raises:
        ConfigError: a value that cannot work.
    """
    parser = make_parser(description, grid.budgets, grid.names, list(grid.data))
    parser.add_argument("--render", action="store_true", help="show what is on file, run nothing")
    parser.add_argument("--cells", metavar="DIR", help="finished cells (default: see README.md)")
    values = parser.parse_args(namespace=argparse.Namespace(trials=None, seeds=None))
    name, storage = budget_and_storage(values, grid.budgets)
    name = name or (next(iter(grid.budgets)) if values.render else default_budget(grid.budgets))
    usual = [source for source in paper.USUAL.get(name, ()) if source in grid.data]
    asked, model = values.data, values.recommender
    values.data = values.recommender = None
    settings = overrides(values) | ({"recommender.model": model} if model else {})
    named = settings.pop("data.source", None)  # by --config, --like or --set
    data = asked or ([named] if named else usual or list(grid.data))
    budget = grid.budgets[name]
    cells = Path(values.cells or script.resolve().parent / "results" / "cells")
    if not values.cells and not cells.is_dir():
        cells = Store.open(storage).root / "cells"
    num_seeds, only = values.seeds or budget.seeds, values.only or []
    repeated = {"budget": [name], "seeds": [num_seeds], "data": data, "only": only}
    repeated |= {"set": [f"{path}={json.dumps(value)}" for path, value in settings.items()]}
    words = [w for flag, each in repeated.items() for one in each for w in (f"--{flag}", str(one))]
    return GridArguments(
        budget_name=name,
        budget=budget,
        settings=settings,
        data=data,
        only=only,
        num_seeds=num_seeds,
        storage=storage,
        cells=Cells(cells),
        command=shlex.join(["python", f"experiments/{script.name}", *words]),
        render=values.render,
    )


def tables_on_file(
    grid: Grid, arguments: GridArguments, left_out: Mapping[str, str] | None = None
) -> list[DatasetTables]:
    """All that is on file of a grid, for the data sets and entries that the user chose.

    Args:
        grid: the question.
        arguments: which part of it.
        left_out: why data sets and entries ("DATA: ENTRY") were not run.
    """
    parts, left_out = [], left_out or {}
    for dataset in datasets(grid, arguments):
        name, source = dataset.name, dataset.experiment.data.source
        cells = {entry: cell for entry in dataset.entries if (cell := dataset.cell(entry))}
        reasons = {
            entry: left_out.get(f"{name}: {entry}", left_out.get(name, "not run yet"))
            for entry in dataset.entries
            if entry not in cells
        }
        sides = {(c.first, c.second) for c in grid.claims if {c.first, c.second} <= cells.keys()}
        comparisons = {
            (first, second): dataset.cells.comparison(name, cells[first], cells[second])
            for first, second in sides
        }
        common, label = to_dict(dataset.experiment), paper.LABELS.get(source)
        base = dict(flat(common))
        part = DatasetTables(
            title=f"{name} ({label})" if label else name,
            entries=list(dataset.entries),
            cells=cells,
            missing=reasons,
            pairs=compare_cells(grid.claims, cells, comparisons, source),
            published={who: rows[source] for who, rows in grid.published.items() if source in rows},
            num_candidates=dataset.experiment.data.num_candidates,
            common=common,
            settings={
                name: {"kind": entry.kind, "joined": entry.fused, **entry.judged}
                | {path: value for path, value in flat(to_dict(own)) if value != base.get(path)}
                for name, (entry, own) in dataset.entries.items()
            },
        )
        parts.append(part)
    return parts


def show(folder: Path, grid: Grid, arguments: GridArguments, left_out: Mapping[str, str]) -> str:
    """Write the page of all that is on file into `folder`; returns the tables for the terminal."""
    parts = tables_on_file(grid, arguments, left_out)
    names = [] if arguments.only else dict.fromkeys(name for part in parts for name in part.cells)
    only = shlex.join(word for name in names for word in ("--only", name))
    results = {
        "title": grid.title,
        "question": grid.question,
        "facts": {
            "Data": ", ".join(part.title for part in parts),
            "Backbone": parts[0].common["backbone"]["source"],
            "Budget": f"{arguments.budget_name}: {arguments.budget.summary}",
            "But": ", ".join(f"{path} = {value}" for path, value in arguments.settings.items()),
            "Training seeds": arguments.num_seeds,
        },
        "command": " ".join(filter(None, [arguments.command, only, "--cells NEW_FOLDER"])),
        "notes": grid.notes,
    }
    return write_page(folder, results, parts, grid.curves)


def run(grid: Grid, description: str, script: str) -> Path:
    """Compute the cells that are missing, then show all that are on file.

    Args:
        grid: the question.
        description: of the script, for --help.
        script: its path.

    Returns:
        The folder of the page, the tables and the figures.
    """
    arguments = parse(grid, description, Path(script))
    left_out: dict[str, str] = {}
    if not arguments.render:
        from rsllm.study.measure import fill  # it loads torch and Ray, which showing does not need

        left_out = fill(grid, arguments)
    with results_folder(Store.open(arguments.storage), slug(grid.title), "page.html") as folder:
        print(show(folder, grid, arguments, left_out))
        print(f"\ncells: {arguments.cells.root}")
    return folder
