"""A bucket for tests, `objects://FOLDER`, in which files come whole and are never renamed.

It is kept in a local folder, so other processes see it too, and notes who reads and writes what.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

LOG = "RSLLM_TEST_OBJECT_LOG"


class ObjectStore(LocalFileSystem):
    """Makes folders by itself, as a bucket has none, and refuses to rename."""

    protocol = "objects"

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(os.fspath(path).removeprefix("objects://"))

    def mv(self, path1: Any, path2: Any, **options: Any) -> None:
        raise NotImplementedError("a bucket cannot rename")

    def get_file(self, path1: Any, path2: Any, **options: Any) -> None:
        _note(f"get {path1}")
        super().get_file(path1, path2, **options)

    def put_file(self, path1: Any, path2: Any, **options: Any) -> None:
        _note(f"put {path2}")
        super().put_file(path1, path2, **options)


def _note(access: str) -> None:
    if log := os.environ.get(LOG):
        with open(log, "a") as file:
            file.write(access + "\n")


def register() -> None:
    """Let this process know `objects://`."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)


def search_path(folder: Path) -> str:
    """The PYTHONPATH with which other processes know `objects://`, as an installed driver."""
    driver = folder / "object_store-1.0.dist-info"
    driver.mkdir(parents=True)
    (driver / "METADATA").write_text("Metadata-Version: 2.1\nName: object-store\nVersion: 1.0\n")
    entry = "[fsspec.specs]\nobjects = object_store:ObjectStore\n"
    (driver / "entry_points.txt").write_text(entry)
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(paths)
