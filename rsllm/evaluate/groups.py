"""Groups of held-out rows by their target: they say where a method is good, and where a gain comes
from."""

# Axes: R rows.

from __future__ import annotations

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Bools, Rows

FEWEST_USERS = 5
"""Of fewer users a group's metrics say nothing, and almost what each one did."""
BY_COUNT = {
    "never trained on": (0, 0),
    "1 to 4 interactions": (1, 4),
    "5 to 19 interactions": (5, 19),
    "20 interactions or more": (20, 2**62),
}
"""The fewest and the most training interactions of the target; they part the rows."""
BY_TIME = ("later than the item before", "at the same time")
"""They part the rows, too. What comes at the same time as the item before it (both bought on one
day, say) is often much like it."""
GROUPS = (*BY_COUNT, *BY_TIME)


def target_groups(rows: Rows, data: PreparedData) -> dict[str, Bools]:
    """Which rows are in each of `GROUPS`; data without times have no groups by time. [R] each.

    Raises:
        DataError: a file of interactions is damaged or has another schema.
    """
    count_R = data.catalogue.counts_I[rows.target_R]
    groups = {name: (low <= count_R) & (count_R <= high) for name, (low, high) in BY_COUNT.items()}
    if data.facts["counts"].get("timed", True):
        later_R = rows.time_R > data.times_before(rows)
        groups |= dict(zip(BY_TIME, (later_R, ~later_R), strict=True))
    return groups
