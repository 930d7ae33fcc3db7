"""The token of the endpoint, in a file that its owner alone can read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from rsllm.errors import require

SHORTEST = 20
"""Characters of a token."""


def make_token(file: Path) -> str:
    """Write a token that its owner alone can read, and return it."""
    token = secrets.token_urlsafe(32)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.touch(mode=0o600, exist_ok=False)
    file.write_text(token + "\n")
    return token


def read_token(file: Path) -> str:
    """The token of a file.

    Raises:
        ConfigError: there is none, it is too short, or others can read it.
    """
    require(file.is_file(), f"there is no token file {file}; write a secret into it, mode 0600")
    facts = file.stat()
    # Kubernetes mounts secrets as root's, readable by the pod's group.
    others = 0o077 if facts.st_uid == os.getuid() else 0o007
    loose = stat.S_IMODE(facts.st_mode) & others
    require(not loose, f"others can read the token in {file}; chmod 600 it, and change the token")
    token = file.read_text().strip()
    long = len(token) >= SHORTEST and token.isascii() and token.isprintable()
    require(long, f"the token in {file} is no line of {SHORTEST} ASCII characters or more")
    return token
