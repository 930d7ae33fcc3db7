"""What is on file of one data set of a grid, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rsllm.evaluate.metrics import brief_metrics
from rsllm.report import tables
from rsllm.report.tables import Table, show
from rsllm.store.versions import deciding_results

Cell = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTables:
    """Tables of the cells of one data set, and of the claims about them."""

    title: str
    entries: Sequence[str]
    """All that was asked for."""
    cells: Mapping[str, Cell]
    """By entry, as far as they are on file."""
    missing: Mapping[str, str]
    """By entry, why it is not on file."""
    pairs: Sequence[Mapping[str, Any]]
    """The claims with their tests."""
    published: Mapping[str, Mapping[str, Mapping[str, float | str]]]
    """Figures of others on its published split, by publication and entry."""
    num_candidates: int
    common: Mapping[str, Any]
    """The experiment of the data set, of which entries set some."""
    settings: Mapping[str, Any]
    """By entry, what it sets."""

    @property
    def chance(self) -> float:
        """HR@1 of a guess."""
        return 1 / self.num_candidates

    @property
    def about(self) -> str:
        """On what all this was found out."""
        first = next(iter(self.cells.values()))
        seeds = max(len(cell["seeds"]) for cell in self.cells.values())
        whose = " of the recommender" if self.common["data"]["candidates"] == "recommender" else ""
        over = " and seeds" if seeds > 1 else "; with one seed nothing is known of other trainings"
        return (
            f"{first['data']['split']} split, the same {first['n']} test users for all (of"
            f" {first['data']['counts'].get('users')} in the data) with {self.num_candidates}"
            f" candidates{whose}: by chance HR@1 is {self.chance:.3f}. Intervals are over"
            f" users{over}."
        )

    @property
    def methods(self) -> Table:
        """Every entry's metrics, with published ones in columns of their own."""
        elsewhere = [name for figures in self.published.values() for name in figures]
        known = {*self.cells, *elsewhere}
        names = [n for n in dict.fromkeys([*self.entries, *elsewhere]) if n in known]
        levels = {"HR@1": self.chance}
        return Table(self.title, [self._row(name) for name in names], "paper", levels)

    def _row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"method": name}
        if cell := self.cells.get(name):
            row |= {"gamma": cell.get("gamma"), "samples": _whole(cell, "samples"), "n": cell["n"]}
            row |= {"seeds": len(cell["seeds"]) or None}
            row |= {"recommender's weight": cell["predictions"].get("weight")}
            row |= {metric: cell["metrics"].get(metric) for metric in brief_metrics()}
            row["code"] = "older" if _is_older(cell) else None
            row["HR@10, catalogue"] = (cell.get("catalogue_metrics") or {}).get("HR@10")
            judged = (cell["generation"] or {}).get("free", {}).get("LLaRA", {})
            row |= {"HitRatio@1": judged.get("hits_of_all")}
            row |= {"ValidRatio": judged.get("ValidRatio"), "answers": judged.get("n")}
        for publication, methods in self.published.items():
            if figures := methods.get(name):
                column = f"{publication}: {' / '.join(figures)}"
                row[column] = " / ".join(map(show, figures.values()))
        return row

    @property
    def claims(self) -> Table:
        """Each claim in the metric that decides it."""
        table = tables.pairs({"pairs": tables.claimed(self.pairs)})
        return replace(table, title=f"Claims, {self.title}")

    @property
    def tables(self) -> list[Table]:
        """All there are; in some nothing may stand."""
        results = {"methods": [{"name": name, **cell} for name, cell in self.cells.items()]}
        doubts = [
            {"method": name, "seed": seed, "doubt": doubt}
            for name, cell in self.cells.items()
            for seed, each in zip(cell["seeds"], cell.get("doubts", ()), strict=False)
            for doubt in each
        ]
        cost = [
            {"method": name, "training, s": cell.get("seconds"), "tokens": _whole(cell, "tokens")}
            | {"trained": cell.get("trainable"), "ranking, s": cell["ranking_seconds"]}
            | {"precision": cell["layout"]["precision"] if cell["backbone"] else None}
            | {"cell": cell["key"], "filed": cell["provenance"]["time"]}
            | {name: cell["provenance"][name] for name in ("machine", "rsllm")}
            for name, cell in self.cells.items()
        ]
        others = [
            Table("Doubts about trainings", doubts, "doubts"),
            tables.deployed(results),
            tables.by_seed(results),
            tables.likelihoods(results),
            tables.generated(results),
            tables.by_target(results),
            tables.gains({"pairs": self.pairs}),
            Table("Cost and provenance", cost, "spent"),
        ]
        claims = replace(tables.pairs({"pairs": self.pairs}), title=f"Claims, {self.title}")
        titled = [replace(table, title=f"{table.title}, {self.title}") for table in others]
        return [claims, self.methods, *titled]


def _is_older(cell: Cell) -> bool:
    """Whether the code that decides such numbers has changed since they were filed."""
    code, stages = cell.get("code"), () if cell["backbone"] else ("stage-1", "stage-2")
    decides = {kind: n for kind, n in deciding_results().items() if kind not in stages}
    # Files from before a kind was there say nothing of it; the very first ones of no kind.
    return code is None or any(code.get(kind, n) != n for kind, n in decides.items())


def _whole(cell: Cell, name: str) -> int | None:
    """A count, which is a mean over seeds, in whole numbers."""
    return round(cell[name]) if name in cell else None
