"""A process group of one, so that engines and tasks run inside the test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_data import small_data
from world import group_of_one

from rsllm.data.prepared import PreparedData


@pytest.fixture(scope="package", autouse=True)
def this_process_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """60 training rows and five rows in either held-out split."""
    return small_data(tmp_path_factory.mktemp("data") / "small", num_held_out=5)
