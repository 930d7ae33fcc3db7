"""A test that the gate skips without a reason on file has failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from skips import MAY_SKIP

TESTS = Path(__file__).parent
CODE = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_listed(number):
    pytest.skip("it is a giant")

@pytest.mark.skipif(True, reason="it is a dwarf")
def test_unlisted():
    pass

@pytest.mark.xfail
def test_that_fails_as_expected():
    assert False
"""
LIST = "import skips\nskips.MAY_SKIP['test_made_up.py::test_listed'] = 'why'\n"


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_what_is_not_on_the_list_fails_in_the_gate(ci: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(CODE)
    (tmp_path / "listed.py").write_text(LIST)
    places = os.pathsep.join([str(tmp_path), str(TESTS)])
    command = [sys.executable, "-m", "pytest", "-p", "skips", "-p", "listed", str(tmp_path)]
    done = subprocess.run(
        command,
        env=os.environ | {"CI": ci, "PYTHONPATH": places},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout
    counted = "2 skipped, 1 xfailed, 1 error" if ci else "3 skipped, 1 xfailed"
    assert counted in done.stdout
    assert ("it is a dwarf, and tests/skips.py does not say" in done.stdout) == bool(ci)


def test_the_list_names_tests_that_there_are() -> None:
    for name in MAY_SKIP:
        file, _, test = name.partition("::")
        assert f"def {test}" in (TESTS / file).read_text(), name
