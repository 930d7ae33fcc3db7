"""A process group of one, so that engines and tasks run inside the test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from small_data import small_data

from rsllm.data.prepared import PreparedData


@pytest.fixture(scope="package", autouse=True)
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it; Ray Train sets it
        yield
    dist.destroy_process_group()


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """60 training rows and five rows in either held-out split."""
    return small_data(tmp_path_factory.mktemp("data") / "small", num_held_out=5)
