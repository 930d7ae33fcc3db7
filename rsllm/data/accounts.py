"""What became of every raw line, interaction and row: the sums are checked, kept and shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from rsllm.data.passes import Job, Users
from rsllm.data.raw import Items
from rsllm.data.sequences import SPLITS, Catalogue

DROPPED = ("below_min_rating", "duplicates", "outside_core", "beyond_max_history")
BY_ROW = ("seen", "short_history", "cold_target", "kept")


def facts(
    job: Job, items: Items, catalogue: Catalogue, users: Users, counts: Counter[str]
) -> dict[str, Any]:
    """The content of counts.json.

    Nothing is lost: what is read is used or rejected, what is used is kept or dropped by a named
    filter, and what is kept is a row's target or history only.
    """
    config, source = job.config, job.data.source
    assert counts["used"] == counts["kept"] + sum(counts[name] for name in DROPPED)
    assert counts["kept"] == counts["history_only"] + sum(counts[f"{s}.seen"] for s in SPLITS)
    read = counts["used"] + counts["rejected"] + items.rows_read
    rejected = counts["rejected"] + len(items.rejects)
    interactions = {"read": counts["used"], **{name: counts[name] for name in DROPPED}}
    return {
        "source": source.name,
        "domain": source.domain,
        "family": source.family,
        "raw": {"read": read, "used": read - rejected, "rejected": rejected},
        "items": len(catalogue.title_keys_I),
        "distinct_titles": int(catalogue.title_keys_I.max()) + 1,
        "other_titles": items.other_titles,
        "cold_items": int((catalogue.counts_I == 0).sum()),
        "users": len(users.split_U),
        "interactions": {
            **interactions,
            "kept": counts["kept"],
            "history_only": counts["history_only"],
        },
        "cuts": list(users.cuts) if config.split == "time" else None,
        "rows": {split: {name: counts[f"{split}.{name}"] for name in BY_ROW} for split in SPLITS},
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The same as a table, without what is zero."""
    parts = {"raw lines": facts["raw"], "interactions": facts["interactions"]}
    parts |= {f"{split} rows": counts for split, counts in facts["rows"].items()}
    rows = [
        [name, ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items() if n)]
        for name, counts in parts.items()
    ]
    names = ("users", "items", "distinct_titles", "cold_items")
    rows.append(["", ", ".join(f"{facts[name]:,} {name.replace('_', ' ')}" for name in names)])
    return tabulate(rows, tablefmt="plain")
