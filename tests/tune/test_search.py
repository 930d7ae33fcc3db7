"""Where a search may stop its trials."""

from __future__ import annotations

import pytest

from rsllm.tune.search import METRIC, _numbers, _scheduler


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


def test_a_curve_keeps_all_that_a_stage_reports_and_nothing_of_tunes() -> None:
    ours = {
        "MRR": 0.5,
        "HR@1": 0.3,
        "loss/ranking": 1.0,
        "contrast/user_cosine": 0.4,
        "health/slot_scale": 2.0,
        "prompts/cut_titles": 3.0,
        "samples": 8.0,
        METRIC: 0.5,
    }
    assert _numbers({**ours, "trial_id": "x", "training_iteration": 1, "pid": 7}) == ours
