"""Results as files and tables: `results.json`, `trials.csv`, one self-contained HTML page.

Titles, names and errors come from data and are inert everywhere: escaped in HTML, quoted in CSV,
stripped of control characters in the terminal.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tabulate import tabulate

from rsllm.evaluate import plots
from rsllm.evaluate.metrics import METRICS
from rsllm.runs import write_json

Results = Mapping[str, Any]
PLOTTED = ("HR@1", "MRR")
BRIEF = ("HR@1", "HR@5", "NDCG@10", "MRR")
"""What the terminal shows of each method; files hold every metric."""
METHODS_NOTE = (
    "Means over n users (and seeds) with 95 % intervals (Wilson for 0/1 values, else bootstrap)."
)
GENERATED_NOTE = (
    "Greedy answers, free or constrained to the row's candidates. LLaRA's rule: exactly one"
    " candidate's title is part of the answer; strict: it is the answer. hits_of_all counts invalid"
    " answers as misses; free and by LLaRA's rule, it is the HitRatio@1 that LLaRA publishes."
    " perfect_invalid: the share of rows in which the rule calls the target's own title invalid."
)
ORDERS_NOTE = (
    "The same rows ranked again under random orders of their candidates. first_choice_changes: the"
    " chance that another order changes the first choice. Spread: standard deviation over orders."
    " Thirds: HR@1 where the target stood in that part of the list, over all orders."
)
HEALTH_NOTE = (
    "Slot scale: length of slot vectors over that of token vectors. Slot attention: what the last"
    " prompt token pays to slots, over what it would without a preference. Gradient share: of each"
    " weighted loss, at the final states. Accuracy: share of rows whose own vector is nearest to"
    " their target's; cosine: mean with the negatives. On probe rows, or the last step's."
)
PAIRS_NOTE = (
    "Difference: first minus second on the same users (and seeds). A verdict needs an interval"
    " without 0 and p (Holm), adjusted for the whole table, below 5 %. Detectable: with 80 % power."
    " Seconds: of training. Ahead: on validation when the faster one was done, untested."
)


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; a cell is text, a number, an estimate (value, low, high, n) or None."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


def write_report(folder: Path, results: Results) -> None:
    """Write `results.json`, `trials.csv` and `report.html` into `folder`, which must exist."""
    write_json(folder / "results.json", results)
    _write_csv(folder / "trials.csv", results["trials"])
    (folder / "report.html").write_text(_html(results), encoding="utf-8")


def tables(results: Results) -> str:
    """The trials, if there are any, the methods and the paired tests, for the terminal."""
    searched = [_recommender(results), _trials(results)] if "search" in results else []
    methods = [_methods(results, BRIEF), _generated(results), _orders(results)]
    shown = [*searched, confirmed(results), *methods, _pairs(results)]
    return "\n\n".join(f"{show(table.title)}\n{_grid(table)}" for table in shown if table.rows)


def show(cell: Any) -> str:
    """A cell as one line of printable text."""
    if cell is None:
        return "-"
    if isinstance(cell, Mapping):
        return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "".join(char if char.isprintable() else " " for char in str(cell))


def _grid(table: Table) -> str:
    header, *rows = [[show(cell) for cell in row] for row in (table.header, *table.rows)]
    return tabulate(rows, header, disable_numparse=True)


def _trials(results: Results) -> Table:
    search, trials = results["search"], results["trials"]
    parameters = _names(trial["parameters"] for trial in trials)
    scores = ["MRR", "HR@1"]

    def rank(trial: Mapping[str, Any]) -> float:
        score = trial.get(search["metric"])
        return math.inf if score is None else -score

    named = any("name" in trial for trial in trials)
    kind = "Variants" if named else "Trials"
    note = (
        f"The best trial was chosen on these {search['n']} {search['split']} users, so its"
        " score here flatters it; the methods' table is measured on other users."
    )
    return Table(
        title=f"{kind}, ranked by {search['split']} {search['metric']}",
        header=["trial", "state", *scores, *parameters, "samples", "seconds", "error"],
        rows=[
            [trial.get("name", trial["number"]), trial["state"]]
            + [trial.get(name) for name in scores]
            + [trial["parameters"].get(name) for name in parameters]
            + [trial["samples"], trial["seconds"], trial["error"]]
            for trial in sorted(trials, key=rank)
        ],
        note="" if named else note,
    )


def _health(results: Results) -> Table:
    """What each trial's last validation says of its losses and slots."""
    trials = [trial for trial in results["trials"] if trial["curve"]]
    ends = [trial["curve"][-1] for trial in trials]
    watched = [
        n for n in _names(ends) if n.startswith(("health/", "contrast/", "loss/", "prompts/"))
    ]
    return Table(
        title="Health at the last validation",
        header=["trial", *(name.removeprefix("health/") for name in watched)],
        rows=[
            [trial.get("name", trial["number"]), *map(end.get, watched)]
            for trial, end in zip(trials, ends, strict=True)
        ],
        note=HEALTH_NOTE,
    )


def _methods(results: Results, only: Sequence[str] = ()) -> Table:
    """Every metric of every method, or only some of them."""
    methods = results["methods"]
    names = [n for n in _metrics(m["metrics"] for m in methods) if n in only or not only]
    return Table(
        title=f"Methods on the {results.get('split', 'test')} users",
        header=["method", "scorer", "n", *names, "seconds"],
        rows=[
            [method["name"], method["scorer"], method["n"]]
            + [method["metrics"].get(name) for name in names]
            + [method["seconds"]]
            for method in methods
        ],
        note=METHODS_NOTE,
    )


def _likelihoods(results: Results) -> Table:
    """How language models rank by what they would write, whatever they are ranked by above."""
    kinds = {"sum": "likelihood_metrics", "mean per token": "per_token_metrics"}
    spoken = [m for m in results["methods"] if m.get("per_token_metrics")]
    return Table(
        title="Ranked by the log-probability of the answer",
        header=["method", "log-probability", *PLOTTED],
        rows=[
            [method["name"], kind, *map((method[key] or method["metrics"]).get, PLOTTED)]
            for method in spoken
            for kind, key in kinds.items()
        ],
        note="The sum, terminator included, is the score; the mean stands beside it.",
    )


def _generated(results: Results) -> Table:
    """A row per method, decoding and rule of validity."""
    keys = ("n", "ValidRatio", "hits_of_all", "hits_of_valid", "perfect_invalid")
    return Table(
        title="Generated answers",
        header=["method", "decoding", "rule", *keys],
        rows=[
            [method["name"], decoding, rule, *map(judged.get, keys)]
            for method in results["methods"]
            for decoding, rules in (method["generation"] or {}).items()
            for rule, judged in rules.items()
        ],
        note=GENERATED_NOTE,
    )


def _orders(results: Results) -> Table:
    keys = ("orders", "first_choice_changes", "HR@1 mean", "HR@1 spread")
    thirds = [f"HR@1, {part} third" for part in ("first", "middle", "last")]
    return Table(
        title="Order of the candidates",
        header=["method", *keys, *thirds],
        rows=[
            [method["name"], *map(found.get, [*keys, *thirds])]
            for method in results["methods"]
            if (found := method.get("candidate_orders"))
        ],
        note=ORDERS_NOTE,
    )


def confirmed(results: Results) -> Table:
    """The search's best trials on fresh seeds."""
    keys = ("name", "search_score", "mean", "lowest", "highest", "seeds")
    return Table(
        title="Validation MRR on fresh seeds",
        header=["", "in the search", *keys[2:]],
        rows=[[row[key] for key in keys] for row in results.get("confirm", ())],
        note="Being chosen flatters a score in the search; the mean on fresh seeds does not.",
    )


def _pairs(results: Results) -> Table:
    keys = ("claim", "metric", "first", "second", "difference", "p", "p_holm", "verdict")
    more = ("minimum_detectable", "seconds", "ahead")
    return Table(
        title="Paired comparisons",
        header=[*keys[:6], "p (Holm)", "verdict", "detectable", *more[1:]],
        rows=[[pair.get(key) for key in (*keys, *more)] for pair in results["pairs"]],
        note=PAIRS_NOTE,
    )


def _recommender(results: Results) -> Table:
    splits = results["recommender"]
    metrics = _metrics(splits.values())
    return Table(
        title="The recommender alone, exact expectation over uniform candidate draws",
        header=["split", *metrics],
        rows=[[name, *map(split.get, metrics)] for name, split in splits.items()],
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key of the mappings once, in order of appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _metrics(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those ranking metrics that any of the mappings has."""
    found = _names(mappings)
    return [name for name in METRICS if name in found]


def _write_csv(path: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    rows = [{**trial, **trial["parameters"]} for trial in trials]
    columns = [name for name in _names(rows) if name not in ("parameters", "curve")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(inert, columns))
        writer.writerows([inert(row.get(name)) for name in columns] for row in rows)


def inert(cell: Any) -> Any:
    """A spreadsheet runs text that opens with one of these as a formula; an apostrophe stops it."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _search_plots(results: Results) -> dict[str, str]:
    trials, search = results["trials"], results["search"]
    metric, best = search["metric"], search["best"]
    chance = (search.get("chance") or {}).get(metric)
    trained = f"{search['split'].capitalize()} {metric} while training"
    drawn = {trained: plots.learning_curves(trials, metric, best, chance)}
    drawn["Training loss"] = plots.learning_curves(trials, "loss", best)
    for name in _names(trial["parameters"] for trial in trials):
        drawn[name] = plots.tuned_values(trials, name, metric, best)
    return drawn


def _method_plots(results: Results) -> dict[str, str]:
    methods, chance = results["methods"], results["search"].get("chance") or {}
    split = results.get("split", "test").capitalize()
    return {
        f"{split} {metric}, means with 95 % intervals": plots.forest(
            methods, metric, chance.get(metric)
        )
        for metric in PLOTTED
    }


def _html(results: Results) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["show"] = show
    search = results["search"]
    best = next((t for t in results["trials"] if t["number"] == search["best"]), None)
    return environment.get_template("report.html").render(
        results=results,
        search=search,
        split=results.get("split", "test"),
        best=best,
        variant=best and best.get("name"),
        methods=_methods(results),
        likelihoods=_likelihoods(results),
        generated=_generated(results),
        orders=_orders(results),
        pairs=_pairs(results),
        trials=_trials(results),
        health=_health(results),
        recommender=_recommender(results),
        method_plots=_method_plots(results),
        search_plots=_search_plots(results),
        setup=[
            Table(part.capitalize(), ("", ""), list(_flat(results[part])))
            for part in ("budget", "data", "experiment", "provenance")
        ],
    )
