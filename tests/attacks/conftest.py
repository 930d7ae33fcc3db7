from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rsllm.errors import RsllmError


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that only a payload creates."""
    return tmp_path / "canary"


@pytest.fixture
def refused(canary: Path, tmp_path: Path) -> Any:
    """A block that must raise one of our errors with one line, run nothing and write nothing."""

    @contextmanager
    def attack(match: str | None = None) -> Iterator[None]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RsllmError, match=match) as error:
            yield
        assert not canary.exists()
        assert sorted(tmp_path.rglob("*")) == before
        assert str(error.value).strip()
        assert len(str(error.value).splitlines()) == 1

    return attack
