"""Every raw line is accounted for: refused, counted, and reported to the user."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy import stats
from tabulate import tabulate

from rsllm.config.data import table_flag
from rsllm.data.passes import Job, Users
from rsllm.data.raw import (
    ARTICLES,
    ENTITIES,
    FOLDED,
    YEARS,
    RawItems,
)
from rsllm.data.rejects import Reject, check_rejects, hint_of, most_frequent
from rsllm.data.sequences import SPLITS, Catalogue

DROPPED = ("below_min_rating", "duplicates", "outside_core", "beyond_max_history")
BY_ROW = ("seen", "short_history", "cold_target", "kept")
FEW_USERS = 200
"""Below this the preparation says what the split leaves to test, and what that could show."""
REMEDIES = {
    FOLDED: f"; {table_flag('fold_ids', 'false')} keeps them",
    YEARS: f"; {table_flag('years', 'keep')} keeps them",
    ARTICLES: f"; {table_flag('move_articles', 'false')} leaves them",
    ENTITIES: f"; {table_flag('unescape', 'true')} reads them",
}
"""The flag that switches each change of values."""


def refuse(
    job: Job, items: RawItems, rejects: list[Reject], counts: Counter[str], listed: Path
) -> None:
    """Raise if there are too many rejects, with what would have them read."""
    rows_read = counts["used"] + counts["rejected"] + items.rows_read
    source, hint = job.data.source, ""
    if rejects:
        first, names = most_frequent(rejects), [file.name for file in job.data.items]
        table = source.items if source.items and first.file in names else source.interactions
        hint = hint_of(first, table, items.ids, names[0] if names else "")
    useless = not counts["used"]
    allowed = job.config.max_rejected_rows
    check_rejects(rejects, rows_read, allowed, listed, hint=hint, useless=useless)


def facts_of(
    job: Job, items: RawItems, catalogue: Catalogue, users: Users, counts: Counter[str]
) -> dict[str, Any]:
    """The content of counts.json.

    Nothing is lost: what is read is used or rejected, what is used is kept or dropped by a named
    filter, and what is kept is a row's target or history only.
    """
    source = job.data.source
    assert counts["used"] == counts["kept"] + sum(counts[name] for name in DROPPED)
    assert counts["kept"] == counts["history_only"] + sum(counts[f"{s}.seen"] for s in SPLITS)
    read = counts["used"] + counts["rejected"] + items.rows_read
    rejected = counts["rejected"] + len(items.rejects)
    dropped = {name: counts[name] for name in (*DROPPED, "kept", "history_only")}
    return {
        "source": source.name,
        "domain": source.domain,
        "family": source.family,
        "timed": source.timed,
        "raw": {"read": read, "used": read - rejected, "rejected": rejected},
        "items": len(catalogue.title_keys_I),
        "distinct_titles": int(catalogue.title_keys_I.max()) + 1,
        "other_titles": items.other_titles,
        "cold_items": int((catalogue.counts_I == 0).sum()),
        "users": len(users.split_U),
        "interactions": {"read": counts["used"], **dropped},
        "changes": items.changes,
        "cuts": list(users.cuts) if job.config.split == "time" else None,
        "rows": {split: {name: counts[f"{split}.{name}"] for name in BY_ROW} for split in SPLITS},
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The facts as a table for the terminal, without counts of zero."""
    parts = {"raw lines": facts["raw"], "interactions": facts["interactions"]}
    parts |= {f"{split} rows": counts for split, counts in facts["rows"].items()}
    names = ("users", "items", "distinct_titles", "other_titles", "cold_items")
    parts[""] = {name: facts[name] for name in names}
    shown = {
        part: ", ".join(f"{n:,} {w.replace('_', ' ')}" for w, n in counts.items() if n or not part)
        for part, counts in parts.items()
    }
    shown |= {
        what: f"{count:,}, such as {example!r}{REMEDIES.get(what, '')}"
        for what, (count, example) in facts["changes"].items()
    }
    if facts["users"] < FEW_USERS:
        shown["test users"] = _power(facts["rows"]["test"]["kept"])
    return tabulate(shown.items(), tablefmt="plain")


def _power(num_users: int) -> str:
    """The smallest difference that so many test users show, if methods disagree on half of them."""
    difference = math.inf
    if num_users > 1:
        quantiles = stats.t.ppf((0.975, 0.8), num_users - 1)
        difference = quantiles.sum() * math.sqrt(0.5 / num_users)
    if difference > 1:
        return f"{num_users:,}, too few to tell two methods apart"
    return (
        f"{num_users:,}; methods that disagree on every second one are told apart by"
        f" {difference:.2f} HR@1 or more (80 % power)"
    )
