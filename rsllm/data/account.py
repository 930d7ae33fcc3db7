"""Every raw line is accounted for: used and counted, or refused with what would have it read."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy import stats
from tabulate import tabulate

from rsllm.config.data import table_flag
from rsllm.data.delimited import COUNT, QUOTES
from rsllm.data.files import Reject, TableFormat
from rsllm.data.passes import Job, Users
from rsllm.data.raw import FOLDED, RawItems
from rsllm.data.sequences import SPLITS, Catalogue
from rsllm.data.titles import ARTICLES, ENTITIES, YEARS
from rsllm.data.values import fold_id, time_units
from rsllm.errors import DataError

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
    layout, hint = job.data.layout, ""
    if rejects:
        first, names = most_frequent(rejects), [file.name for file in job.data.items]
        table = layout.items if layout.items and first.file in names else layout.interactions
        hint = hint_of(first, table, items.ids, names[0] if names else "")
    useless = not counts["used"]
    allowed = job.config.max_rejected_rows
    check_rejects(rejects, rows_read, allowed, listed, hint=hint, useless=useless)


def check_rejects(
    rejects: Sequence[Reject],
    rows_read: int,
    allowed: int,
    listed: Path,
    hint: str = "",
    useless: bool = False,
) -> None:
    """Write the rejects to `listed`, one JSON object a line, and refuse too many of them.

    Raises:
        DataError: more than `allowed`, with the most frequent reason's first value, and the way
            out; what is `useless` without them has none but the hint.
    """
    if rejects:
        lines = (json.dumps(asdict(reject), sort_keys=True) for reject in rejects)
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{line}\n" for line in lines))
    if len(rejects) > (0 if useless else allowed):
        reasons = Counter(reject.reason for reject in rejects)
        summary = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(9))
        more = f" To go on without them: --set data.max_rejected_rows={len(rejects)}"
        raise DataError(
            f"{len(rejects):,} of {rows_read:,} rows rejected ({summary});"
            f" {most_frequent(rejects)}{hint}; all: {listed}.{'' if useless else more}"
        )


def most_frequent(rejects: Sequence[Reject]) -> Reject:
    """Return the first reject of the most frequent reason."""
    ((reason, _),) = Counter(reject.reason for reject in rejects).most_common(1)
    return next(reject for reject in rejects if reject.reason == reason)


def hint_of(reject: Reject, table: TableFormat, ids: Sequence[str], items_file: str) -> str:
    """Return the setting that would have the line read, as far as its value tells."""
    match reject.reason:
        case "bad time":
            fits = [unit for unit in time_units([reject.value]) if unit != table.time_unit]
            if not fits:
                return f"; say its format, such as {table_flag('time_unit', '%d/%m/%Y')}"
            return f"; looks like {fits[0]}: {table_flag('time_unit', fits[0])}"
        case "unknown item" if ids:
            near = next((i for i in ids if _letters(i) == _letters(reject.value)), "")
            own = f"{near!r}" if near else f"ids such as {ids[0]!r}"
            fold = near == fold_id(reject.value) and near != reject.value
            way = f": {table_flag('fold_ids', 'true')} makes them one" if fold else ""
            return f"; {items_file or 'the catalogue'} has {own}{way}"
        case reason if reason in (COUNT, QUOTES) and table.quote and table.quote in reject.value:
            return f"; where quotes are just text: {table_flag('quote', 'none')}"
        case reason if reason.startswith("undecodable text"):
            return f"; if it is not {table.encoding}: {table_flag('encoding', 'cp1252')}"
        case "bad rating":
            return f"; choose a number{f' from 0 to {table.max_rating:g}' * bool(table.max_rating)}"
        case "bad split":
            return f"; choose {', '.join(SPLITS)}"
        case "no JSON object":
            return "; write one object a line, or one array of them"
    return ""


def _letters(item: str) -> str:
    return fold_id(item.strip()).lstrip("0").casefold()


def facts_of(
    job: Job, items: RawItems, catalogue: Catalogue, users: Users, counts: Counter[str]
) -> dict[str, Any]:
    """Return the content of counts.json.

    Nothing is lost: what is read is used or rejected, what is used is kept or dropped by a named
    filter, and what is kept is a row's target or history only.
    """
    layout = job.data.layout
    assert counts["used"] == counts["kept"] + sum(counts[name] for name in DROPPED)
    assert counts["kept"] == counts["history_only"] + sum(counts[f"{s}.seen"] for s in SPLITS)
    read = counts["used"] + counts["rejected"] + items.rows_read
    rejected = counts["rejected"] + len(items.rejects)
    dropped = {name: counts[name] for name in (*DROPPED, "kept", "history_only")}
    return {
        "source": layout.name,
        "domain": layout.domain,
        "family": layout.family,
        "timed": layout.timed,
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
    """Return the facts as a table for the terminal, without counts of zero."""
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
