"""Claims about methods, the paired tests that are made of them, and the words for what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rsllm.data.sequences import Bools
from rsllm.evaluate.groups import FEWEST_USERS
from rsllm.evaluate.metrics import compared_metrics
from rsllm.evaluate.statistics import SIGNIFICANCE, holm, paired

BETTER, WORSE, UNTOLD, NOT_COMPUTED = "better", "worse", "cannot be told", "not computed"
HERE = " here"
"""Added where one training stood against one: what was seen may be the luck of these two."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """`first` is better than `second`, or, without a second, answers validly above a threshold."""

    first: str
    second: str = ""
    text: str | None = None
    """What it would show."""
    above: float = 0.0
    """Without a second: what the ratio of valid answers exceeds."""
    gains: Mapping[str, float] = field(default_factory=dict)
    """By data source: the published gain in HitRatio@1."""


def judge(difference: Mapping[str, float], p: float, trainings: int) -> str:
    """Say what is known of the first method: p is below 5 % and the interval is without 0.

    The interval of several seeds holds their luck, of which the test over users knows nothing. Of
    one training against one, nothing is said but that it is better here.

    Args:
        difference: an estimate, first minus second.
        p: adjusted for the other claims.
        trainings: of the method with more of them; 0 where no seed changes either.
    """
    if p >= SIGNIFICANCE or difference["low"] <= 0 <= difference["high"]:
        return UNTOLD
    word = BETTER if difference["value"] > 0 else WORSE
    return word + HERE if trainings == 1 else word


def adjust(rows: Sequence[Row]) -> list[Row]:
    """Add verdicts, and p-values adjusted for all rows that have one (Holm)."""
    adjusted = iter(holm([row["p"] for row in rows if "p" in row]))
    judged = []
    for row in rows:
        if "p" in row:
            p = next(adjusted)
            row = row | {"p_holm": p, "verdict": judge(row["difference"], p, row["seeds"])}
        judged.append(row)
    return judged


def paired_tests(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], metrics: Sequence[str]
) -> dict[str, Row]:
    """Compare two methods, given by their metrics per user or [S, R], on the same rows."""
    return {metric: asdict(paired(first[metric], second[metric])) for metric in metrics}


def paired_by_target(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], groups: Mapping[str, Bools]
) -> dict[str, Row]:
    """Compare two methods in each group of rows that has enough users."""
    found = {}
    for name, own_R in groups.items():
        if (n := int(own_R.sum())) >= FEWEST_USERS:
            one, other = (
                {metric: np.atleast_2d(values)[:, own_R] for metric, values in vectors.items()}
                for vectors in (first, second)
            )
            found[name] = {"n": n, **paired_tests(one, other, compared_metrics())}
    return found


def compare(
    vectors: Mapping[str, Mapping[str, np.ndarray]], claims: Sequence[Claim], metrics: Sequence[str]
) -> list[Row]:
    """Test claims metric by metric, corrected over the whole table.

    Args:
        vectors: the metrics of each method, by its name.
        claims: which to compare.
        metrics: in which.
    """
    tests = [paired_tests(vectors[c.first], vectors[c.second], metrics) for c in claims]
    return adjust(
        [
            {"first": claim.first, "second": claim.second, "claim": claim.text, "metric": metric}
            | test[metric]
            for metric in metrics
            for claim, test in zip(claims, tests, strict=True)
        ]
    )


def compare_cells(
    claims: Sequence[Claim],
    cells: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[tuple[str, str], Mapping[str, Any] | None],
    source: str,
) -> list[Row]:
    """Judge the claims about one data set's cells, each metric corrected by itself.

    Args:
        claims: all of them; those of entries that are not here are left out.
        cells: of one data set, by entry.
        comparisons: what was computed, if anything, by first and second.
        source: the data's, for published gains.
    """
    main, *others = compared_metrics()
    rows: dict[str, list[Row]] = {metric: [] for metric in (main, *others)}
    for claim in claims:
        sides = [name for name in (claim.first, claim.second) if name]
        if not cells.keys() >= set(sides):
            continue
        row: Row = {"first": claim.first, "second": claim.second, "claim": claim.text}
        row["seeds"] = max(len(cells[name]["seeds"]) for name in sides)
        compared = comparisons.get((claim.first, claim.second))
        if not claim.second:
            rows[main].append(row | _validity(cells[claim.first], claim.above))
        elif not compared:
            rows[main].append(row | {"metric": main, "verdict": NOT_COMPUTED})
        tests, by_target = ((compared or {}).get(part, {}) for part in ("tests", "by_target"))
        for metric in rows.keys() & tests.keys():
            gain = claim.gains.get(source) if metric == main else None
            groups = {name: {"n": test["n"], **test[metric]} for name, test in by_target.items()}
            test = {**tests[metric], **row, "metric": metric, "published gain": gain}
            test |= {"size": size(test["difference"], gain), "by_target": groups}
            rows[metric].append(test)
    return [row for group in rows.values() for row in adjust(group)]


def size(difference: Mapping[str, float], gain: float | None) -> str | None:
    """Whether a difference that was found is as large as the published one."""
    if gain is None:
        return None
    if difference["high"] < gain:
        return "smaller than published"
    return "larger than published" if difference["low"] > gain else "published gain not excluded"


def _validity(cell: Mapping[str, Any], threshold: float) -> Row:
    """The ratio of valid free answers above a threshold, judged by its interval alone."""
    row: Row = {"second": f"{threshold:g}", "metric": "ValidRatio"}
    if not cell["generation"]:
        return row | {"verdict": NOT_COMPUTED}
    ratio = cell["generation"]["free"]["LLaRA"]["ValidRatio"]
    moved = {end: ratio[end] - threshold for end in ("value", "low", "high")} | {"n": ratio["n"]}
    return row | {"difference": moved, "verdict": judge(moved, 0.0, len(cell["seeds"]))}
