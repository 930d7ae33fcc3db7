from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rsllm.report.page import terminal_tables, write_report

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
STUDIES = {
    path.relative_to(RESULTS).as_posix(): path
    for path in sorted(RESULTS.rglob("*.json"))
    if "methods" in json.loads(path.read_text())
}
HOSTILE = "=cmd|' /C calc'!A0 <script>alert(1)</script> \x1b[31m {{ 7 * 7 }} $\\frac{$"


def estimate(value: float, n: int = 95) -> dict[str, Any]:
    return {"value": value, "low": value - 0.08, "high": value + 0.09, "n": n}


def trial(number: int, state: str = "finished") -> dict[str, Any]:
    score = None if state == "failed" else 0.3 + 0.02 * number
    steps = range(1, 2 if state == "stopped" else 5)
    curve = [
        {"samples": 512 * s, "MRR": 0.2 + 0.02 * number * s, "HR@1": 0.1, "loss": 3 - 0.3 * s}
        for s in steps
    ]
    return {
        "number": number,
        "state": state,
        "parameters": {
            "alpha": 0.05 * number,
            "beta": 0.1,
            "temperature": 0.07 * 3**number,
            "gamma": 1.0,
        },
        "samples": 512 * len(curve),
        "seconds": 31.5,
        "curve": [] if state == "failed" else curve,
        "MRR": score,
        "HR@1": score and score / 2,
        "error": "TrainingError: loss is NaN" if state == "failed" else None,
    }


def study() -> dict[str, Any]:
    """A made-up result with every kind of entry the report knows."""
    metrics = {"HR@1": estimate(0.42), "NDCG@10": estimate(0.6), "MRR": estimate(0.55)}
    judged = {
        "n": 95,
        "ValidRatio": estimate(0.9),
        "hits_of_all": estimate(0.4),
        "hits_of_valid": estimate(0.44),
        "perfect_invalid": 0.016,
    }
    silent = judged | {"ValidRatio": estimate(0.0), "hits_of_valid": None}
    orders = {
        "orders": 5,
        "first_choice_changes": estimate(0.61),
        "HR@1 mean": 0.41,
        "HR@1 spread": 0.03,
        "HR@1, first third": 0.6,
        "HR@1, middle third": 0.3,
        "HR@1, last third": None,
    }
    return {
        "title": "Loss weights on MovieLens-100K",
        "question": "Which loss weights rank the next film best?",
        "budget": {"trials": 4, "samples": 2048},
        "data": {"users": 943, "test rows": 95},
        "backbone": "smollm2-135m-q4",
        "provenance": {"rsllm": "0.1.0", "packages": {"torch": "2.13"}},
        "notes": ["One seed."],
        "experiment": {"stage2": {"loss": {"alpha": 0.1}}, "seed": 0},
        "trials": [trial(0), trial(1, "stopped"), trial(2, "failed"), trial(3)],
        "search": {
            "metric": "MRR",
            "split": "validation",
            "n": 94,
            "best": 3,
            "p_beats_chance": 1e-5,
            "chance": {"MRR": 0.18, "HR@1": 0.05},
        },
        "methods": [
            {
                "name": "tuned",
                "scorer": "likelihood",
                "n": 95,
                "metrics": metrics,
                "generation": {"free": {"LLaRA": judged, "strict": silent}},
                "candidate_orders": orders,
                "seconds": 12.0,
            },
            {
                "name": "random",
                "scorer": "none",
                "n": 95,
                "metrics": {"HR@1": estimate(0.05), "MRR": estimate(0.18)},
                "generation": None,
                "seconds": None,
            },
        ],
        "pairs": [
            {
                "first": "tuned",
                "second": "random",
                "metric": "MRR",
                "difference": estimate(0.37),
                "p": 0.0001,
                "p_holm": 0.0002,
                "verdict": "better",
                "minimum_detectable": 0.07,
                "claim": None,
            }
        ],
        "recommender": {"validation": metrics, "test": {"HR@1": estimate(0.35)}},
    }


class Page(HTMLParser):
    """The tags, attributes and text of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def full_study() -> dict[str, Any]:
    """A search under a cost, confirmed on fresh seeds, with methods of several seeds."""
    results = study()
    results["trials"] = [trial(number) for number in range(8)]
    for entry in results["trials"]:
        cost = 10.0 + (entry["number"] - 4) ** 2
        entry["objectives"] = {"device_seconds": cost, "score": entry["MRR"]}
    results["search"]["best"] = 7
    results["seeds"] = [1000, 1001]
    equal = {"seconds": 31.5, "values": [0.5, 0.25]}
    results["pairs"][0] |= {"equal_seconds": equal, "ahead": "tuned"}
    confirmed = {"name": "trial 7", "seeds": [1000, 1001], "scores": [0.4, 0.42], "mean": 0.41}
    worse = confirmed | {"name": "trial 6", "mean": 0.39, "search_score": 0.45}
    results["confirm"] = [worse, confirmed | {"search_score": 0.44}]
    by_seed = {seed: {"MRR": estimate(value)} for seed, value in (("1000", 0.5), ("1001", 0.6))}
    results["methods"][0]["by_seed"] = by_seed
    results["fusion"] = {"weight": 2.0, "curve": [[0.0, 0.4], [0.5, 0.5], [2.0, 0.6], [1e6, 0.3]]}
    results["layout"] = "1 trial at a time"
    return results


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def written(folder: Path, results: dict[str, Any]) -> tuple[Page, list[dict[str, str]]]:
    write_report(folder, results)
    assert json.loads((folder / "results.json").read_text()) == results
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    return page, rows_of(folder / "trials.csv")


def test_report_holds_the_numbers_and_the_plots(tmp_path: Path) -> None:
    page, rows = written(tmp_path, study())
    # methods, training, trials
    assert page.tags.count("svg") == 3
    # trials, methods, answers, orders, pairs, recommender, cost, four of settings
    assert page.tags.count("table") == 11
    for text in ("0.420", "0.340", "better", "chance", "trial 3", "stage2.loss.alpha"):
        assert text in page.text
    assert [row["number"] for row in rows] == ["0", "1", "2", "3"]
    assert (rows[3]["MRR"], rows[2]["MRR"], rows[2]["state"]) == ("0.36", "", "failed")
    assert rows[3]["alpha"] == str(0.05 * 3)


def test_a_report_says_how_to_recommend_with_what_it_chose(tmp_path: Path) -> None:
    command = "rsllm recommend stage-2/0d67 --storage '/a b/<c>' --out lists.csv"
    write_report(tmp_path, study(), command)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert command in page.text
    assert f"\n\n    {command}\n\n" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert command not in (tmp_path / "results.json").read_text(), "it is of this machine"
    write_report(tmp_path, study())
    assert "lists.csv" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_claim_is_answered_with_its_uncertainty(tmp_path: Path) -> None:
    results = study()
    pair = results["pairs"][0] | {"claim": "tuning helps", "metric": "MRR"}
    doubtful = pair | {"claim": "x helps", "verdict": "not distinguishable", "p_holm": 1.0}
    other = pair | {"metric": "HR@1", "verdict": "not distinguishable"}
    results["pairs"] = [pair, doubtful | {"difference": estimate(-0.02)}, other]
    page, _ = written(tmp_path, results)
    text = " ".join(page.text.split())
    sure = "Yes Tuning helps tuned is 0.370 MRR above random (95 % interval +0.290 to +0.460"
    assert f"{sure}, p = 0.0002). By HR@1: cannot be told (+0.370)." in text
    doubt = "Cannot be told X helps tuned is 0.020 MRR below random (95 % interval -0.100 to +0.070"
    power = "These 95 users would show a true difference of 0.070 with 80 % power, were it the only"
    assert f"{doubt}, p = 1). {power} comparison." in text
    assert "3 comparisons adjusted together (Holm, 5 % level); trained under one seed" in text


def test_what_only_some_studies_have_is_shown(tmp_path: Path) -> None:
    page, rows = written(tmp_path, full_study())
    text = " ".join(page.text.split())
    for shown in (
        "After 32 s of training each, tuned was ahead on validation (0.500 against 0.250).",
        "Trial 7 has the best score of 8: MRR 0.44 on 94 validation users (p against chance 1e-05,"
        " times the trials it was chosen from)",
        "Under 2 fresh seeds trial 7 has 0.410 on average, where the search had 0.440.",
        "Validation MRR on fresh seeds",
        "Methods by training seed",
        "What mattered among the tuned values",
        "trained under 2 seeds",
    ):
        assert shown in text
    front = text[text.index("Pareto front trial device_seconds") :].split("No finished trial")[0]
    assert re.findall(r" (\d) (?:10|11|14|19) ", front) == ["4", "5", "6", "7"]
    assert rows[0]["objectives"]


@pytest.mark.parametrize("name", STUDIES)
def test_committed_studies_keep_their_report(name: str, tmp_path: Path) -> None:
    results = json.loads(STUDIES[name].read_text())
    page, rows = written(tmp_path, results)
    assert page.tags.count("svg") >= 2
    assert len(rows) == len(results["trials"])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for pair in results["pairs"]:
        assert (pair["claim"] or pair["first"]) in page.text
        assert (pair["claim"] or pair["first"]) in markdown
    for method in results["methods"]:
        assert f"{method['metrics']['MRR']['value']:.3f}" in page.text


def test_markdown_and_methods_have_the_same_numbers(tmp_path: Path) -> None:
    written(tmp_path, full_study())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split(" |")]
        for line in text.splitlines()
        if re.match(r"\| tuned +\| likelihood", line)
    ]
    assert cells[0][:4] == ["tuned", "likelihood", "95", "0.420 [0.340, 0.510]"]
    for title in ("# Loss weights on MovieLens-100K", "## Verdicts", "## Cost", "### Provenance"):
        assert f"\n{title}\n" in f"\n{text}"
    tuned, random = rows_of(tmp_path / "methods.csv")
    assert (tuned["name"], tuned["HR@1"], tuned["HR@1 low"]) == ("tuned", "0.42", str(0.42 - 0.08))
    assert (random["n"], random["NDCG@10"], random["seconds"]) == ("95", "", "")


def test_report_reaches_for_nothing_outside(tmp_path: Path) -> None:
    page, _ = written(tmp_path, study())
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "action")]
    assert all(value and value.startswith("#") for value in references)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import", html)


def test_report_is_the_same_twice(tmp_path: Path) -> None:
    write_report(tmp_path, study())
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, study())
    assert (tmp_path / "report.html").read_bytes() == first


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    results = study() | {"title": HOSTILE, "question": HOSTILE, "notes": [HOSTILE]}
    results["methods"][0]["name"] = results["pairs"][0]["first"] = HOSTILE
    results["pairs"][0]["claim"] = results["data"][HOSTILE] = HOSTILE
    for entry in results["trials"]:
        entry |= {"error": HOSTILE, "parameters": {HOSTILE: HOSTILE}}
    page, rows = written(tmp_path, results)
    assert "script" not in page.tags
    assert "<script" not in (tmp_path / "report.md").read_text()
    assert rows_of(tmp_path / "methods.csv")[0]["name"] == "'" + HOSTILE
    assert "{{ 7 * 7 }}" in page.text
    assert all(row["error"] == "'" + HOSTILE for row in rows)
    assert all(name[0] not in "=+-@" for name in rows[0])
    assert "\x1b" not in terminal_tables(results)


def test_csv_quotes_formulas_but_not_numbers(tmp_path: Path) -> None:
    cells = ["-1.5", "+3", "a=b", "-1+cmd", "@sum", "\t=1", "\tx", " -x", "-inf", "", "0"]
    results = study()
    results["trials"] = [trial(number) | {"error": cell} for number, cell in enumerate(cells)]
    _, rows = written(tmp_path, results)
    expected = ["-1.5", "+3", "a=b", "'-1+cmd", "'@sum", "'\t=1", "'\tx", "' -x", "-inf", "", "0"]
    assert [row["error"] for row in rows] == expected


def without_trials(results: dict[str, Any]) -> None:
    results["trials"] = []
    results["search"] |= {"best": None, "p_beats_chance": None}


def one_trial(results: dict[str, Any]) -> None:
    results["trials"] = [trial(3)]


def only_failures(results: dict[str, Any]) -> None:
    results["trials"] = [trial(0, "failed"), trial(1, "failed")]
    results["search"] |= {"best": None, "p_beats_chance": None, "chance": None}


def nothing_evaluated(results: dict[str, Any]) -> None:
    results |= {"methods": [], "pairs": [], "recommender": {}, "notes": []}


def long_names(results: dict[str, Any]) -> None:
    results["title"] = results["methods"][0]["name"] = "very long title " * 40 + "x" * 300


def named_choices(results: dict[str, Any]) -> None:
    for entry, choice in zip(results["trials"], ["a", "b", None, True], strict=True):
        entry["parameters"] = {"scorer": choice}


@pytest.mark.parametrize(
    "change",
    [without_trials, one_trial, only_failures, nothing_evaluated, long_names, named_choices],
)
def test_sparse_results_still_make_a_report(tmp_path: Path, change: Any) -> None:
    results = study()
    change(results)
    page, rows = written(tmp_path, results)
    assert len(rows) == len(results["trials"])
    assert results["title"] in page.text
    assert terminal_tables(results).count("\n") >= 3


def test_terminal_tables_rank_trials_and_state_verdicts() -> None:
    text = terminal_tables(study())
    recommender, trials, methods, generated, orders, pairs = text.split("\n\n")
    assert "validation" in recommender
    assert [line.split()[0] for line in trials.splitlines()[3:]] == ["3", "1", "0", "2"]
    assert "0.420 [0.340, 0.510]" in methods
    assert "better" in pairs
    strict = generated.splitlines()[4]
    assert strict.split()[:4] == ["tuned", "free", "strict", "95"]
    assert "0.016" in strict
    assert "last third" not in orders, "no target stood there"


def test_terminal_shows_what_fresh_seeds_left_of_the_search() -> None:
    row = {"name": "trial 3", "seeds": [1000, 1001], "scores": [0.31, 0.35], "mean": 0.33}
    results = study() | {"confirm": [row | {"search_score": 0.41}]}
    results["pairs"][0] |= {"seconds": [120.5, 95.0], "ahead": "random"}
    found = {
        table.splitlines()[0]: table.splitlines()
        for table in terminal_tables(results).split("\n\n")
    }
    confirmed = found["Validation MRR on fresh seeds"]
    shown = "trial 3 0.41 0.33 0.31 0.35"
    assert " ".join(confirmed[3].split()) == shown
    assert " ".join(found["Paired comparisons"][3].split()).endswith(
        "better 0.07 [120.5, 95.0] random"
    )


def test_metrics_stand_in_order_however_they_are_stored(tmp_path: Path) -> None:
    results = study()
    for method in results["methods"]:
        method["metrics"] = {name: estimate(0.4) for name in ("HR@1", "HR@10", "HR@5", "MRR")}
    page, _ = written(tmp_path, results)
    assert page.text.index("HR@5") < page.text.index("HR@10")
    (header,) = [line for line in terminal_tables(results).splitlines() if "scorer" in line]
    assert header.split()[3:6] == ["HR@1", "HR@5", "MRR"]
