"""What a user sees while something goes on: a bar on a terminal, plain lines in a file."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from tqdm import tqdm

LINE_SECONDS, BAR_SECONDS = 10.0, 0.5
DELAY = 1.0
"""Seconds after which a step that may be short says how far it is."""
LIVE = "RSLLM_LIVE"
"""Set in Ray's processes where who waits for them sits at a terminal."""


def say(message: str) -> None:
    """Tell the user what goes on, on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def notes_on_stderr(wanted: bool) -> Iterator[None]:
    """Where programs read standard output, what is said meanwhile goes to stderr."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def as_json(value: Any) -> str:
    """What `--json` prints: sets in order, numbers of numpy as numbers, null for what is none."""
    text = json.dumps(value, default=lambda v: v.item() if hasattr(v, "item") else sorted(v))
    # NaN and Infinity, which Python writes and JSON does not know.
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)


class Progress(tqdm):  # type: ignore[misc]
    """How far a step is, with rate and time left; without a terminal, a line now and then."""

    def __init__(self, *rows: Any, **how: Any) -> None:
        self.plain = not sys.stderr.isatty()
        line = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
        usual = {
            "bar_format": line if self.plain else None,
            "mininterval": LINE_SECONDS if self.plain else BAR_SECONDS,
            "leave": False,
        }
        super().__init__(*rows, **usual | how)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the bar, or say the line; the first one says what begins."""
        if not self.plain:
            return bool(super().display(msg, pos))
        begins = f"{self.desc}: {self.total:,}{self.unit}" if self.total else self.desc
        say(str(self) if self.n else begins)
        return True

    def close(self) -> None:
        """Take the bar away; a line stays."""
        if self.plain:
            self.disable = True
        super().close()
