"""Raw lines that cannot be used are listed, counted, and refused with what would read them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rsllm.config.data import table_flag
from rsllm.data.delimited import COUNT, QUOTES
from rsllm.data.files import TableFormat
from rsllm.data.sequences import SPLITS
from rsllm.data.values import folded_id, time_units
from rsllm.errors import DataError


@dataclass(frozen=True)
class Reject:
    """A raw line that cannot be used."""

    file: str
    line: int
    """Line in the file (row, in Parquet), counted from 1, headers included."""
    reason: str
    value: str = ""
    """The value at fault."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.value!r} in {self.file}:{self.line}"


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
    """The first reject of the most frequent reason."""
    ((reason, _),) = Counter(reject.reason for reject in rejects).most_common(1)
    return next(reject for reject in rejects if reject.reason == reason)


def hint_of(reject: Reject, table: TableFormat, ids: Sequence[str], items_file: str) -> str:
    """The setting that would have the line read, as far as its value tells."""
    match reject.reason:
        case "bad time":
            fits = [unit for unit in time_units([reject.value]) if unit != table.time_unit]
            if not fits:
                return f"; say its format, such as {table_flag('time_unit', '%d/%m/%Y')}"
            return f"; looks like {fits[0]}: {table_flag('time_unit', fits[0])}"
        case "unknown item" if ids:
            near = next((i for i in ids if _letters(i) == _letters(reject.value)), "")
            own = f"{near!r}" if near else f"ids such as {ids[0]!r}"
            fold = near == folded_id(reject.value) and near != reject.value
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
    return folded_id(item.strip()).lstrip("0").casefold()
