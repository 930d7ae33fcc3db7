"""What a user sees of steps that take long, where no terminal is."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from rsllm import terminal
from rsllm.compute.start import quieten
from rsllm.terminal import Progress


def test_in_a_file_lines_are_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    assert list(Progress(range(3), "sort", total=3, unit=" parts", miniters=1)) == [0, 1, 2]
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "\x1b" not in said
    first, *later = said.splitlines()
    assert first == "sort: 3 parts"
    assert [line.partition(",")[0] for line in later] == [
        f"sort: {n} of 3 parts" for n in (1, 2, 3)
    ]
    assert all(line.endswith(" left") for line in later)


def test_what_is_quick_says_only_that_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=2, desc="recommend", unit=" users") as shown:
        shown.update(2)
    assert capsys.readouterr().err == "recommend: 2 users\n"
    with Progress(desc="download", unit="B") as shown:  # of a size that nobody says
        shown.update(2)
    assert capsys.readouterr().err == "download\n"


def test_what_libraries_say_to_developers_is_kept_back() -> None:
    """Ray's own functions warn, so that another wording of a later Ray is noticed."""
    from ray._private.authentication import authentication_token_setup as ray_token

    logger, said = ray_token.logger, list[str]()
    handler, before = logging.Handler(), list(logger.filters)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.WARNING)  # a Ray that was started before may have raised it
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            quieten()
            warnings.warn("is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("of our own", UserWarning, stacklevel=1)
        ray_token._warn_token_auth_enabled()
        ray_token._warn_token_auth_disabled()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.filters = before
    assert [str(warning.message) for warning in shown] == ["of our own"]
    (line,) = said
    assert "is disabled" in line


def test_deepspeed_is_imported_in_silence() -> None:
    code = "from rsllm.compute.start import quieten\nquieten()\nimport deepspeed"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
