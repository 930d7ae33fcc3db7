"""Results as tables, for the terminal, the page, Markdown and spreadsheets."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsllm.evaluate.groups import GROUPS
from rsllm.evaluate.metrics import METRICS, brief_metrics, compared_metrics
from rsllm.report.trials import importance, names, pareto_front, scored

Results = Mapping[str, Any]
OLD_WORDS = {"not distinguishable": "cannot be told"}
"""Verdicts in results of before, and what they are called now."""
OLD_GROUPS = ("popular", "middle", "rare", "cold")
"""Groups of targets in results of before."""


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; a cell is text, a number, an estimate (value, low, high, n) or None."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    """What stands beneath it, by its name in `report.notes`."""
    levels: Mapping[str, float] | None = None
    """What some columns' estimates are compared with: chance, or 0."""

    def __bool__(self) -> bool:
        """Whether anything stands beside the names of its rows."""
        return len(self.header) > 1

    @property
    def header(self) -> list[str]:
        """The columns in which anything stands."""
        return [c for c in names(self.rows) if any(row.get(c) is not None for row in self.rows)]

    def cells(self, as_text: Callable[[Any], str]) -> list[list[str]]:
        """All rows as texts."""
        return [[str(as_text(row.get(name))) for name in self.header] for row in self.rows]

    def scale(self, column: str) -> tuple[float, float]:
        """From the lowest to the highest end of a column's intervals, its level included."""
        cells = [row[column] for row in self.rows if isinstance(row.get(column), Mapping)]
        ends = [cell[end] for cell in cells for end in ("low", "high")]
        ends += [level for name, level in (self.levels or {}).items() if name == column]
        return min(ends), max(ends)


def show(cell: Any) -> str:
    """A cell as one line of printable text."""
    if cell is None:
        return "-"
    if isinstance(cell, Mapping):
        return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "".join(char if char.isprintable() else " " for char in str(cell))


def inert(cell: Any) -> Any:
    """A spreadsheet runs text that opens with one of these as a formula; an apostrophe stops it."""
    if not isinstance(cell, str) or not re.match(r"[\t\r]|\s*[=+@-]", cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def trials(results: Results) -> Table:
    """Every trial, the best first."""
    search, named = results["search"], any("name" in trial for trial in results["trials"])
    ranked = scored(results["trials"], search["metric"])
    ranked.sort(key=lambda trial: -trial[search["metric"]])
    return Table(
        f"{'Variants' if named else 'Trials'}, ranked by {search['split']} {search['metric']}",
        [
            {"trial": trial.get("name", trial["number"]), "state": trial["state"]}
            | {name: trial.get(name) for name in compared_metrics("MRR")}
            | {**(trial.get("objectives") or {}), **trial["parameters"]}
            | {name: trial[name] for name in ("samples", "seconds", "error")}
            for trial in [*ranked, *(t for t in results["trials"] if t not in ranked)]
        ],
        "" if named else "trials",
    )


def front(results: Results) -> Table:
    """The trials that no other beats in all objectives."""
    best = pareto_front(results["trials"])
    rows = [{"trial": t["number"], **t["objectives"], **t["parameters"]} for t in best]
    return Table("Pareto front", rows, "front")


def mattered(results: Results) -> Table:
    """The tuned values by importance."""
    shares = importance(results["trials"], results["search"]["metric"])
    rows = [{"parameter": name, "importance": share} for name, share in shares.items()]
    return Table("What mattered among the tuned values", rows, "importance")


def health(results: Results) -> Table:
    """What each trial's last validation says of its losses and slots."""
    kinds = ("health/", "contrast/", "loss/", "prompts/")
    return Table(
        "Health at the last validation",
        [
            {"trial": trial.get("name", trial["number"])}
            | {k.removeprefix("health/"): v for k, v in end.items() if k.startswith(kinds)}
            for trial in results["trials"]
            for end in trial["curve"][-1:]
        ],
        "health",
    )


def methods(results: Results, only: Iterable[str] = ()) -> Table:
    """Metrics of every method: some, or all."""
    return Table(
        f"Methods on the {results.get('split', 'test')} users",
        [
            {"method": method["name"], "scorer": method["scorer"], "n": method["n"]}
            | {name: method["metrics"].get(name) for name in only or METRICS}
            | {"seconds": method["seconds"]}
            for method in results["methods"]
        ],
        "methods",
        levels=(results.get("search") or {}).get("chance"),
    )


def deployed(results: Results) -> Table:
    """What each method's lists are worth to users who choose from the whole catalogue."""
    title = "As deployed: lists of ten from the whole catalogue, without what was seen"
    return Table(title, _part(results, "deployed"), "deployed")


def by_seed(results: Results) -> Table:
    """What each training seed of a method came to."""
    return Table(
        "Methods by training seed",
        [
            {"method": method["name"], "seed": seed}
            | {name: found.get(name) for name in brief_metrics()}
            for method in results["methods"]
            for seed, found in (method.get("by_seed") or {}).items()
        ],
    )


def by_target(results: Results) -> Table:
    """How good each method is by groups of targets."""
    return Table(
        "By target",
        [
            {"method": method["name"], "targets": group} | found
            for method in results["methods"]
            for group in (*GROUPS, *OLD_GROUPS)
            for groups in [method.get("by_target") or method.get("by_popularity") or {}]
            if (found := groups.get(group)) and found["n"]
        ],
        "by_target",
    )


def gains(results: Results) -> Table:
    """Where the difference of each claim comes from, by groups of targets."""
    return Table(
        "Where a difference comes from",
        [
            {"claim": pair["claim"], "first": pair["first"], "second": pair["second"]}
            | {"targets": group, "n": found["n"], "metric": pair["metric"]}
            | {key: found[key] for key in ("difference", "p")}
            for pair in claimed(results["pairs"])
            for group in GROUPS
            if (found := (pair.get("by_target") or {}).get(group))
        ],
        "gains",
        levels={"difference": 0.0},
    )


def likelihoods(results: Results) -> Table:
    """How language models rank by what they would write, whatever they are ranked by above."""
    kinds = {"sum": "likelihood_metrics", "mean per token": "per_token_metrics"}
    return Table(
        "Ranked by the log-probability of the answer",
        [
            {"method": method["name"], "log-probability": kind}
            | {
                name: (method[key] or method["metrics"]).get(name)
                for name in compared_metrics("MRR")
            }
            for method in results["methods"]
            if method.get("per_token_metrics")
            for kind, key in kinds.items()
        ],
        "likelihoods",
    )


def generated(results: Results) -> Table:
    """A row per method, decoding and rule of validity."""
    rows = []
    for method in results["methods"]:
        answers = method["generation"] or {}
        if "n" in answers:  # the first files hold free answers under LLaRA's rule alone
            answers = {"free": {"LLaRA": answers}}
        for decoding, rules in answers.items():
            for rule, judged in rules.items():
                rows.append({"method": method["name"], "decoding": decoding, "rule": rule} | judged)
    return Table("Generated answers", rows, "generated")


def orders(results: Results) -> Table:
    """How much the order of the candidates decides."""
    return Table("Order of the candidates", _part(results, "candidate_orders"), "orders")


def _part(results: Results, name: str) -> list[Mapping[str, Any]]:
    """One part of what is known of each method, where it is."""
    return [{"method": m["name"], **m[name]} for m in results["methods"] if m.get(name)]


def claimed(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One test of each claim: in the metric that decides, which comes first."""
    deciding: dict[Any, Mapping[str, Any]] = {}
    for pair in pairs:
        deciding.setdefault((pair.get("claim"), pair["first"], pair["second"]), pair)
    return list(deciding.values())


def pairs(results: Results) -> Table:
    """The claims and their tests."""
    keys = ("claim", "metric", "first", "second", "difference", "p")
    more = ("published gain", "size", "seconds", "ahead")
    return Table(
        "Paired comparisons",
        [
            {key: pair.get(key) for key in keys}
            | {"p (Holm)": pair.get("p_holm"), "verdict": pair["verdict"]}
            | {"detectable": pair.get("minimum_detectable")}
            | {key: pair.get(key) for key in more}
            for pair in results["pairs"]
        ],
        "pairs",
        levels={"difference": 0.0},
    )


def confirm(results: Results) -> Table:
    """The best of the search under fresh seeds."""
    return Table(
        "Validation MRR on fresh seeds",
        [
            {"setting": row["name"], "search": row["search_score"], "mean": row["mean"]}
            | {"samples in the search": row.get("search_samples"), "now": row.get("samples")}
            | {f"seed {s}": v for s, v in zip(row["seeds"], row["scores"], strict=True)}
            for row in results.get("confirm") or ()
        ],
        "confirm",
    )


def recommender(results: Results) -> Table:
    """What stands behind the slots, by itself."""
    return Table(
        "The recommender alone, exact expectation over uniform candidate draws",
        [
            {"split": name} | {metric: split.get(metric) for metric in METRICS}
            for name, split in results["recommender"].items()
        ],
    )


def cost(results: Results) -> Table:
    """What training took, of each variant or of the search, and ranking of each method."""
    trained: dict[str, list[Any]] = {}
    for trial in results["trials"]:
        trained.setdefault(trial.get("name", "search"), []).append(trial)
    ranking = {method["name"]: method["seconds"] for method in results["methods"]}
    rows = []
    for name in dict.fromkeys([*trained, *ranking]):
        group = trained.get(name, [])
        ends = [end for trial in group for end in trial["curve"][-1:]]
        tokens = sum(end.get("tokens_per_second", 0) * end.get("seconds", 0) for end in ends)
        training = {
            "trials": len(group),
            "samples": sum(trial["samples"] for trial in group),
            "tokens": round(tokens),
            "training, s": sum(trial["seconds"] for trial in group),
        }
        spent = {kind: value or None for kind, value in training.items()}
        rows.append({"what": name, **spent, "ranking, s": ranking.get(name)})
    return Table("Cost", rows, "cost")
