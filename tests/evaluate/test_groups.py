"""Groups of rows by their target, against loops over events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_data import small_data

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.evaluate.compare import by_target
from rsllm.evaluate.groups import BY_COUNT, BY_TIME, FEWEST_USERS, GROUPS, target_groups
from rsllm.evaluate.statistics import paired
from rsllm.study.claims import paired_by_target


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small", num_held_out=12)


@pytest.fixture(scope="module")
def rows(data: PreparedData) -> Rows:
    return data.rows("test")


def test_every_row_is_in_one_group_by_count_and_in_one_by_time(
    rows: Rows, data: PreparedData
) -> None:
    events = data.events()
    trained = data.rows("train").target_R.tolist()
    groups = target_groups(rows, data)
    assert tuple(groups) == GROUPS
    for row, target in enumerate(rows.target_R.tolist()):
        count = trained.count(target)
        assert count <= data.catalogue.counts_I[target] <= count + 10, "each user's first item, too"
        count = int(data.catalogue.counts_I[target])
        by_count = "never trained on" if count == 0 else "20 interactions or more"
        by_count = "1 to 4 interactions" if 0 < count < 5 else by_count
        by_count = "5 to 19 interactions" if 5 <= count < 20 else by_count
        own = np.flatnonzero(events.user_E == rows.user_R[row])
        place = int(rows.position_R[row])
        assert events.item_E[own[place]] == target
        later = events.time_E[own[place]] > events.time_E[own[place - 1]]
        expected = {by_count, BY_TIME[0] if later else BY_TIME[1]}
        assert {name for name, own_R in groups.items() if own_R[row]} == expected


def test_a_target_at_the_time_of_the_item_before_it(rows: Rows, data: PreparedData) -> None:
    before_R = data.times_before(rows)
    backwards = rows.take(slice(None, None, -1))
    assert (data.times_before(backwards) == before_R[::-1]).all(), "in whatever order rows come"
    time_R = np.where(np.arange(len(rows)) < 4, before_R, before_R + 1)
    groups = target_groups(replace(rows, time_R=time_R), data)
    assert np.flatnonzero(groups["at the same time"]).tolist() == [0, 1, 2, 3]


def test_data_without_times_have_no_groups_by_time(tmp_path: Path) -> None:
    data = small_data(tmp_path / "small", timed=False)
    assert tuple(target_groups(data.rows("test"), data)) == tuple(BY_COUNT)


def test_metrics_and_differences_of_a_group_are_of_its_rows() -> None:
    """Against a loop; a group of few users shows how many they are, and no more."""
    rng = np.random.default_rng(0)
    vectors = [{name: rng.random((2, 12)) for name in ("HR@1", "MRR")} for _ in range(2)]
    some_R = np.arange(12) % 2 == 0
    groups = {"some": some_R, "few": np.arange(12) < FEWEST_USERS - 1, "none": np.zeros(12, bool)}
    found = by_target(vectors[0], groups)
    mean = sum(vectors[0]["MRR"][seed, row] for seed in (0, 1) for row in range(0, 12, 2)) / 12
    assert found["some"]["MRR"]["value"] == pytest.approx(mean)
    assert (found["some"]["n"], found["few"], found["none"]) == (6, {"n": 4}, {"n": 0})
    tests = paired_by_target(vectors[0], vectors[1], groups)
    own = paired(vectors[0]["HR@1"][:, some_R], vectors[1]["HR@1"][:, some_R])
    assert tests.keys() == {"some"}
    assert tests["some"]["HR@1"]["difference"]["value"] == own.difference.value
    assert (tests["some"]["n"], tests["some"]["HR@1"]["p"]) == (6, own.p)
