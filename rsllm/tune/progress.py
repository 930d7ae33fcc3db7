"""What is shown of trials: the table that is printed whenever one reports, a report's, names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from rsllm.evaluate.statistics import beats_chance
from rsllm.settings import content_hash
from rsllm.tune.journal import COST, METRIC, TrialRecord

COLUMNS = ("samples", METRIC, "HR@1", COST)


def table(records: Sequence[TrialRecord], total: int) -> str:
    """Every trial's tuned values, state, samples and score, and why some failed."""
    best = max((record.score or 0.0 for record in records), default=0.0)
    done = sum(record.state != "running" for record in records)
    failures = [f"trial {r.number} failed: {r.error}" for r in records if r.error]
    lines = [
        f"\n{done} of {total} trials done, {len(failures)} failed, best {METRIC} {best:.3f}",
        tabulate(list(map(_row, records)), headers="keys", floatfmt=".3g"),
        *failures,
    ]
    return "\n".join(lines)


def _row(record: TrialRecord) -> dict[str, Any]:
    last = record.curve[-1] if record.curve else {}
    found = {name: last[name] for name in COLUMNS if name in last}
    return {"trial": record.number, **shown(record.overrides), "state": record.state, **found}


def shown(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The tuned values by the last part of their path."""
    return {path.rsplit(".", 1)[-1]: value for path, value in overrides.items()}


def run_name(text: str, unique: Any) -> str:
    """A text as the name of a run, and what sets it apart from the runs of others."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", ".", text).lstrip(".-")
    return f"{safe[:57]}-{content_hash(unique)[:6]}"


def trial_row(record: TrialRecord, *, cost: bool = False) -> dict[str, Any]:
    """A trial in a report; `cost` names what it was to be good at."""
    last = record.curve[-1] if record.curve else {}
    row = {
        "number": record.number,
        "state": record.state,
        "parameters": shown(record.overrides),
        "samples": int(last.get("samples", 0)),
        "seconds": round(last.get("seconds", 0.0), 1),
        "curve": record.curve,
        "MRR": record.score,
        "HR@1": last.get("HR@1"),
        "error": record.error,
    }
    return row | ({"objectives": {"MRR": record.score, COST: last[COST]}} if cost and last else {})


def searched(best: TrialRecord, n: int, num_candidates: int) -> dict[str, Any]:
    """The best trial on `n` validation rows, and what chance would have reached."""
    chance = sum(1 / rank for rank in range(1, num_candidates + 1)) / num_candidates
    return {
        "metric": "MRR",
        "split": "validation",
        "n": n,
        "best": best.number,
        "p_beats_chance": beats_chance(best.score or 0.0, n, num_candidates),
        "chance": {"MRR": chance, "HR@1": 1 / num_candidates},
    }
