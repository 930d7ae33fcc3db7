"""What the gate may leave out; any other test that is skipped there has failed."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

RATINGS = "MovieLens may not be redistributed, and nothing is downloaded in a test"
MAY_SKIP = {
    "data/test_giant_input.py::test_memory_of_every_process_stays_below_two_gigabytes": (
        "two million interactions take minutes"
    ),
    "data/test_import_llara.py::test_movielens_held_out_rows_agree_up_to_ties": RATINGS,
    "data/test_raw.py::test_movielens_is_the_same_in_both_layouts": RATINGS,
    "data/test_shards.py::test_movielens_counts": RATINGS,
    "evaluate/test_report_in_browser.py": "the gate installs Chromium where Debian's can be had",
    "test_job_submission.py": "RSLLM_TEST_JOBS=1 asks for a cluster of its own; minutes",
    "study/test_search.py::test_a_tracker_is_asked_before_anything_runs": (
        "wandb and mlflow bring a hundred packages that rsllm does without"
    ),
    "test_assets.py::test_real_smollm2_answers_offline": "nothing is downloaded in a test",
}
"""Tests by their names without parameters, or all of a file, and why each may be missing."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    name = item.nodeid.split("[")[0].split("@")[0].removeprefix("tests/")
    skipped = report.skipped and not hasattr(report, "wasxfail")
    known = name in MAY_SKIP or name.split("::")[0] in MAY_SKIP
    if skipped and os.environ.get("CI") == "true" and not known:
        assert isinstance(report.longrepr, tuple)
        report.outcome, reason = "failed", report.longrepr[-1]
        report.longrepr = f"{reason}, and tests/skips.py does not say that the gate may do without"
    return report
