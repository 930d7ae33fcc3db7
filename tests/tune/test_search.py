"""Where a search may stop its trials."""

from __future__ import annotations

import pytest

from rsllm.config import Experiment
from rsllm.settings import replace_in
from rsllm.tune.search import _scheduler


@pytest.mark.parametrize(
    ("samples", "validations", "rungs"),
    [(16, 2, [8]), (96, 3, [32, 64]), (512, 4, [128, 256]), (8, 1, [])],
)
def test_no_trial_is_stopped_at_its_last_report(
    samples: int, validations: int, rungs: list[int]
) -> None:
    settings = {"stage2.samples": samples, "stage2.validations": validations}
    scheduler = _scheduler(replace_in(Experiment(), settings))
    found = [
        milestone
        for bracket in getattr(scheduler, "_brackets", [])
        for milestone, _ in bracket._rungs
    ]
    assert sorted(found) == rungs
    assert max(found, default=0) < samples
