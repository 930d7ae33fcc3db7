"""A table of trials in the terminal, printed whenever one reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from rsllm.tune.journal import COST, METRIC, TrialRecord

COLUMNS = ("samples", METRIC, "HR@1", COST)


def table(records: Sequence[TrialRecord], total: int) -> str:
    """Every trial's tuned values, state, samples and score, and why some failed."""
    rows = [_row(record) for record in records]
    best = max((record.score or 0.0 for record in records), default=0.0)
    done = sum(record.state != "running" for record in records)
    failures = [f"trial {r.number} failed: {r.error}" for r in records if r.error]
    lines = [
        f"\n{done} of {total} trials done, {len(failures)} failed, best {METRIC} {best:.3f}",
        tabulate(rows, headers="keys", floatfmt=".3g"),
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
