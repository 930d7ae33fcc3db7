"""Trials as people read them: the table printed at each report, a report's rows, and names."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from rsllm.config.plain import content_hash
from rsllm.evaluate.metrics import compared_metrics
from rsllm.evaluate.statistics import beats_chance
from rsllm.study.journal import COST, METRIC, TrialRecord

TAKEN = {"trial", "name", "number", "state", "samples", "seconds", "error"}
"""Columns of a report's trials, which no tuned value may go by."""


def table(records: Sequence[TrialRecord], total: int) -> str:
    """Every trial's tuned values, state, samples and score, and why some failed."""
    best = max((record.score or 0.0 for record in records), default=0.0)
    done = sum(record.state != "running" for record in records)
    failures = [f"trial {r.number} failed: {r.error}" for r in records if r.error]
    columns = ["samples", METRIC, *compared_metrics("MRR")[1:], COST]  # the score is the MRR
    rows = [
        {"trial": record.number, **values, "state": record.state}
        | {name: record.end[name] for name in columns if name in record.end}
        for record, values in zip(records, _tuned(records), strict=True)
    ]
    lines = [
        f"\n{done} of {total} trials done, {len(failures)} failed, best {METRIC} {best:.3f}",
        tabulate(rows, headers="keys", floatfmt=".3g"),
        *failures,
    ]
    return "\n".join(lines)


def _tuned(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Each trial's values, by names that are the same in all."""
    paths = {path for record in records for path in record.overrides}
    return [short_names(record.overrides, paths) for record in records]


def short_names(overrides: Mapping[str, Any], among: Collection[str] = ()) -> dict[str, Any]:
    """The tuned values by as much of the end of their paths as tells them from others."""
    paths, named = {*overrides, *among}, {}
    for path, value in overrides.items():
        parts = path.split(".")
        for start in reversed(range(len(parts))):
            end = ".".join(parts[start:])
            if end not in TAKEN and not any(f".{o}".endswith(f".{end}") for o in paths - {path}):
                break
        named[end] = value
    return named


def run_name(text: str, unique: Any) -> str:
    """A text as the name of a run, and what sets it apart from the runs of others."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", ".", text).lstrip(".-")
    return f"{safe[:57]}-{content_hash(unique)[:6]}"


def trial_rows(records: Sequence[TrialRecord], *, cost: bool = False) -> list[dict[str, Any]]:
    """The trials of a report; `cost` names what they were to be good at."""
    rows = []
    for record, tuned in zip(records, _tuned(records), strict=True):
        row = {
            "number": record.number,
            "state": record.state,
            "parameters": tuned,
            "samples": int(record.end.get("samples", 0)),
            "seconds": round(record.end.get("seconds", 0.0), 1),
            "curve": record.curve,
            "MRR": record.score,
            "error": record.error,
        } | {name: record.end.get(name) for name in compared_metrics("MRR")[1:]}
        if cost and record.end:
            row["objectives"] = {"MRR": record.score, COST: record.end[COST]}
        rows.append(row)
    return rows


def summarise(
    best: TrialRecord, records: Sequence[TrialRecord], n: int, num_candidates: int
) -> dict[str, Any]:
    """The best trial on `n` validation rows, and what chance would have reached.

    p against chance is that of one trial times the trials with a score (Bonferroni), since the best
    of many guesses looks better than one.
    """
    scores = sum(record.score is not None for record in records)
    alone = beats_chance(best.score or 0.0, n, num_candidates)
    chance = sum(1 / rank for rank in range(1, num_candidates + 1)) / num_candidates
    return {
        "metric": "MRR",
        "split": "validation",
        "n": n,
        "best": best.number,
        "p_beats_chance": min(1.0, alone * max(1, scores)),
        "chance": {"MRR": chance, "HR@1": 1 / num_candidates},
    }
