"""What a paper claims, and what measured cells say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rsllm.evaluate.statistics import SIGNIFICANCE, holm

Verdict = Literal["reproduced", "not reproduced", "underpowered"]
OURS = {"reproduced": "supported", "not reproduced": "not supported"}
"""What a claim is that nobody has published."""
HERE = " here"
"""Of one training against one: what was seen in these two, and may be their luck."""
METRICS = ("HR@1", "MRR")
"""What is compared; the first decides."""
NOT_COMPUTED = "not computed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """`first` is better than `second`, or, without a second, answers validly above a threshold."""

    text: str
    first: str
    second: str = ""
    above: float = 0.0
    """Without a second: what the ratio of valid answers exceeds."""
    gains: Mapping[str, float] = field(default_factory=dict)
    """By data source: the published gain in HitRatio@1; where it is missing any gain would do."""
    ours: bool = False
    """Not of a paper, as one of what has our ranking loss never is: supported, not reproduced."""


def judge(
    difference: Mapping[str, float], p: float, detectable: float | None, gain: float | None
) -> Verdict:
    """Whether a gain was found, and if not, whether it could have been.

    Reproduced: p is below 5 % and the interval above 0. Not reproduced: the interval is nowhere
    above 0, or excludes the published gain although that was large enough to be detected.
    Underpowered: all else. The interval holds the gain without being surely above 0, the smallest
    detectable difference is above the gain or unknown, or none was published and a small one may
    be there.

    Args:
        difference: its estimate, first minus second.
        p: adjusted for the other claims.
        detectable: the smallest true difference that would show with 80 % power, if known.
        gain: the published one, if there is one.
    """
    low, high = difference["low"], difference["high"]
    if low > 0 and p < SIGNIFICANCE:
        return "reproduced"
    if high <= 0:
        return "not reproduced"
    excluded = gain is not None and high < gain and detectable is not None and detectable <= gain
    return "not reproduced" if excluded else "underpowered"


def claim_rows(
    claims: Sequence[Claim],
    cells: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[tuple[str, str], Mapping[str, Any] | None],
    source: str,
) -> list[dict[str, Any]]:
    """A table's claims with their tests, corrected over the table (Holm), and verdicts.

    Args:
        claims: all of them; those of entries that are not here are left out.
        cells: of one data set, by entry.
        comparisons: what was computed, if anything, by first and second.
        source: the data's, for published gains.
    """
    known = [c for c in claims if c.first in cells and (not c.second or c.second in cells)]
    found = [comparisons.get((claim.first, claim.second)) for claim in known]
    adjusted = iter(holm([each["tests"][METRICS[0]]["p"] for each in found if each]))
    rows = []
    for claim, compared in zip(known, found, strict=True):
        gain = claim.gains.get(source)
        row: dict[str, Any] = {"verdict": NOT_COMPUTED, "claim": claim.text, "first": claim.first}
        row |= {"second": claim.second, "published gain": gain}
        if compared:
            row |= _compared(compared["tests"], next(adjusted), gain)
        elif not claim.second:
            row |= {"second": f"{claim.above:g}"} | _valid(cells[claim.first], claim.above)
        verdict, ours = row["verdict"], claim.ours or cells[claim.first].get("gamma")
        verdict = OURS.get(verdict, verdict) if ours else verdict
        trainings = max(len(cells[n]["seeds"]) for n in (claim.first, claim.second) if n in cells)
        here = HERE if trainings == 1 and verdict not in (NOT_COMPUTED, "underpowered") else ""
        rows.append(row | {"verdict": verdict + here})
    return rows


def size(difference: Mapping[str, float], gain: float | None) -> str | None:
    """Whether a difference that was found is as large as the published one."""
    if gain is None:
        return None
    if difference["high"] < gain:
        return "smaller than published"
    return "larger than published" if difference["low"] > gain else "published gain not excluded"


def _compared(tests: Mapping[str, Any], p_holm: float, gain: float | None) -> dict[str, Any]:
    main, *others = METRICS
    found = tests[main]
    detectable = found["minimum_detectable"]
    return {
        "size": size(found["difference"], gain),
        "difference": found["difference"],
        **{f"{other} difference": tests[other]["difference"] for other in others},
        "p": found["p"],
        "p (Holm)": p_holm,
        "detectable": detectable,
        "verdict": judge(found["difference"], p_holm, detectable, gain),
    }


def _valid(cell: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The ratio of valid free answers above a threshold, judged by its interval alone."""
    if not cell["generation"]:
        return {}
    ratio = cell["generation"]["free"]["LLaRA"]["ValidRatio"]
    moved = {end: ratio[end] - threshold for end in ("value", "low", "high")} | {"n": ratio["n"]}
    return {"difference": moved, "verdict": judge(moved, 0.0, 0.0, None)}
