"""The verb `rsllm docs`: makes a site of the READMEs, the settings and the docstrings."""

import logging
import os
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from rsllm.errors import ConfigError, RsllmError, require
from rsllm.terminal import say

CONFIG = Path(__file__).parents[1] / "mkdocs.yml"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Leave the terminal to the address."""


def docs(out: Path | None) -> None:
    """Write the site to a new folder, or serve it on this machine until Ctrl-C."""
    if out:
        build(out)
        print(out)
        return
    with TemporaryDirectory() as folder:
        build(Path(folder))
        handler = partial(_Quiet, directory=folder)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, suppress(KeyboardInterrupt):
            print(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C", flush=True)
            server.serve_forever()


def build(out: Path) -> None:
    """Make the pages; a link that leads nowhere ends it.

    Raises:
        ConfigError: there is nothing to make them of or with, or the folder holds something.
        RsllmError: a page cannot be made.
    """
    require(CONFIG.exists(), "the pages are made in a clone of rsllm; say `rsllm docs` in one")
    # mkdocs empties the folder that it writes to.
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(empty, f"{out} is no empty folder; name a new one")
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # the theme's, of a version it does not take
    try:
        from mkdocs.commands.build import build as make
        from mkdocs.config import load_config
        from mkdocs.exceptions import MkDocsException

        for part in ("material", "mkdocstrings_handlers.python"):
            import_module(part)
    except ImportError as error:
        extra = f"{CONFIG.parent}[docs]"
        raise ConfigError(f"{error.name} is missing; pip install --editable '{extra}'") from error
    say("rsllm: making the pages")
    logging.getLogger("mkdocs").addHandler(logging.StreamHandler())  # says which page is wrong
    try:
        make(load_config(str(CONFIG), site_dir=str(out.absolute()), strict=True))
    except (MkDocsException, OSError) as error:
        raise RsllmError(f"the pages cannot be made: {error}") from error
