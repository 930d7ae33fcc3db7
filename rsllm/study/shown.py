"""What is on file of a grid, data set by data set, as tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rsllm.config.plain import flat, to_dict
from rsllm.report.tables import BRIEF, Table, by_seed, generated, likelihoods, popularity, show
from rsllm.study import paper
from rsllm.study.claims import claim_rows
from rsllm.study.grid import Asked, Grid, Site, sites
from rsllm.study.results import Cell


@dataclass(frozen=True, slots=True)
class Shown:
    """One data set of a grid, as far as it is on file."""

    title: str
    site: Site
    cells: Mapping[str, Cell]
    claims: Sequence[Mapping[str, Any]]
    published: Mapping[str, Mapping[str, Mapping[str, float | str]]]
    """Figures of others on its published split, by publication and entry."""

    @property
    def names(self) -> list[str]:
        """Of the entries that anything is known of, and of what others alone have measured."""
        elsewhere = [name for found in self.published.values() for name in found]
        known = {*self.cells, *elsewhere}
        return [n for n in dict.fromkeys([*self.site.entries, *elsewhere]) if n in known]

    @property
    def methods(self) -> Table:
        """Every entry's metrics, with published ones in columns of their own."""
        rows = [self._row(name) for name in self.names]
        return Table(self.title, rows, "paper", levels={"HR@1": self.chance})

    @property
    def chance(self) -> float:
        """HR@1 of a guess."""
        return 1 / self.site.experiment.data.num_candidates

    def _row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"method": name}
        if cell := self.cells.get(name):
            row |= {"gamma": cell.get("gamma"), "samples": _whole(cell, "samples"), "n": cell["n"]}
            row |= {"seeds": len(cell["seeds"]) or None}
            row |= {"recommender's weight": cell["predictions"].get("weight")}
            row |= {metric: cell["metrics"].get(metric) for metric in BRIEF}
            row["HR@10, catalogue"] = (cell.get("catalogue_metrics") or {}).get("HR@10")
            judged = (cell["generation"] or {}).get("free", {}).get("LLaRA", {})
            row |= {"HitRatio@1": judged.get("hits_of_all")}
            row |= {"ValidRatio": judged.get("ValidRatio"), "answers": judged.get("n")}
        for source, found in self.published.items():
            if figures := found.get(name):
                row[f"{source}: {' / '.join(figures)}"] = " / ".join(map(show, figures.values()))
        return row

    @property
    def verdicts(self) -> Table:
        """The claims with their tests."""
        levels = {"difference": 0.0, "MRR difference": 0.0}
        return Table(f"Claims, {self.title}", self.claims, "verdicts", levels=levels)

    @property
    def about(self) -> str:
        """On what all this was found out."""
        first, data = next(iter(self.cells.values())), self.site.experiment.data
        seeds = max(len(cell["seeds"]) for cell in self.cells.values())
        over = " and seeds" if seeds > 1 else "; with one seed nothing is known of other trainings"
        return (
            f"{first['data']['split']} split, the same {first['n']} test users for all (of"
            f" {first['data']['counts'].get('users')} in the data) with {data.num_candidates}"
            f" candidates: by chance HR@1 is {self.chance:.3f}. Intervals are over users{over}."
        )

    @property
    def tables(self) -> list[Table]:
        """All in which anything stands."""
        shared = map(self._shared, (by_seed, likelihoods, generated, popularity))
        made = (self.verdicts, self.methods, self._doubts(), *shared, self._cost())
        return [table for table in made if table.rows]

    def _shared(self, make: Callable[[Mapping[str, Any]], Table]) -> Table:
        """A table that reports of studies have too."""
        found = make({"methods": [{"name": name, **cell} for name, cell in self.cells.items()]})
        return replace(found, title=f"{found.title}, {self.title}")

    def _doubts(self) -> Table:
        rows = [
            {"method": name, "seed": seed, "doubt": doubt}
            for name, cell in self.cells.items()
            for seed, doubts in zip(cell["seeds"], cell.get("doubts", ()), strict=False)
            for doubt in doubts
        ]
        return Table(f"Doubts about trainings, {self.title}", rows, "doubts")

    def _cost(self) -> Table:
        rows = [
            {"method": name, "training, s": cell.get("seconds"), "tokens": _whole(cell, "tokens")}
            | {"trained": cell.get("trainable"), "ranking, s": cell["ranking_seconds"]}
            | {"precision": cell["layout"]["precision"] if cell["backbone"] else None}
            | {"cell": cell["key"], "filed": cell["provenance"]["time"]}
            | {name: cell["provenance"][name] for name in ("machine", "rsllm")}
            for name, cell in self.cells.items()
        ]
        return Table(f"Cost and provenance, {self.title}", rows, "spent")

    @property
    def settings(self) -> dict[str, Any]:
        """What every entry has that the experiment of the data set has not."""
        base = dict(flat(self.common))
        return {
            name: {"kind": entry.kind, "joined": entry.fused, **entry.judged}
            | {path: v for path, v in flat(to_dict(own)) if v != base.get(path)}
            for name, (entry, own) in self.site.entries.items()
        }

    @property
    def common(self) -> dict[str, Any]:
        """The experiment of the data set, of which entries set some."""
        return to_dict(self.site.experiment)


def _whole(cell: Cell, name: str) -> int | None:
    """What is counted, as a mean over seeds, in whole numbers."""
    return round(cell[name]) if name in cell else None


def gather(grid: Grid, asked: Asked) -> list[Shown]:
    """All that is on file of a grid, as the user asked for it."""
    return [_shown(grid, site) for site in sites(grid, asked)]


def _shown(grid: Grid, site: Site) -> Shown:
    cells = {name: cell for name in site.entries if (cell := site.cell(name))}
    pairs = {(c.first, c.second) for c in grid.claims if {c.first, c.second} <= cells.keys()}
    comparisons = {p: site.cells.comparison(site.name, cells[p[0]], cells[p[1]]) for p in pairs}
    source = site.experiment.data.source
    label = f" ({paper.LABELS[source]})" if source in paper.LABELS else ""
    published = {name: of[source] for name, of in grid.published.items() if source in of}
    claims = claim_rows(grid.claims, cells, comparisons, source)
    return Shown(site.name + label, site, cells, claims, published)
