"""Where a search may stop its trials."""

from __future__ import annotations

import pytest

from rsllm.tune.search import _scheduler


@pytest.mark.parametrize(
    ("validations", "rungs"),
    [(2, [1]), (3, [1, 2]), (4, [1, 2]), (10, [1, 2, 4, 8]), (20, [3, 6, 12]), (1, [])],
)
def test_no_trial_is_stopped_at_its_last_report(validations: int, rungs: list[int]) -> None:
    scheduler = _scheduler(validations)
    found = [
        milestone
        for bracket in getattr(scheduler, "_brackets", [])
        for milestone, _ in bracket._rungs
    ]
    assert sorted(found) == rungs
    assert max(found, default=0) < validations
