"""Files at a URI, through fsspec: s3://, gs://, abfs:// and whatever else it has a driver for."""

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsllm.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Remote:
    """The files below a URI, by their paths from there; no file is ever renamed.

    Every method raises `CheckpointError` where the URI cannot be reached.
    """

    uri: str

    @contextlib.contextmanager
    def _system(self) -> Iterator[tuple[Any, str]]:
        """The file system, rid of what it remembers of earlier looks, and the URI's path there."""
        import fsspec  # most runs need none, and the command line is to start at once

        try:
            system, root = fsspec.core.url_to_fs(self.uri)
            system.invalidate_cache()
            yield system, root.rstrip("/")
        except Exception as error:  # the file systems' errors share no base class of their own
            reason = str(error).strip() or type(error).__name__
            raise CheckpointError(f"{self.uri} cannot be used: {reason}") from error

    def require_writable(self, remedy: str) -> None:
        """Prove that files can be written.

        Raises:
            ConfigError: they cannot, or a package is missing that would; ends in the remedy.
        """
        try:
            with self._system() as (system, root):
                probe = f"{root}/.probe-{uuid.uuid4().hex[:8]}"
                system.pipe_file(probe, b"rsllm")
                system.rm_file(probe)
        except CheckpointError as error:
            raise ConfigError(f"storage {error}; {remedy}") from error

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a file, or None if there is none."""
        none = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with self._system() as (system, root), none:
            return bytes(system.cat_file(f"{root}/{path}"))
        return None

    def names(self) -> list[str]:
        """Return the names in the folder at the URI, sorted; none if there is no such folder."""
        with self._system() as (system, root), contextlib.suppress(FileNotFoundError):
            entries = system.ls(root, detail=False)
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return []

    def upload(self, folder: Path, names: Iterable[str], path: str) -> None:
        """Put files of a local folder into one here."""
        with self._system() as (system, root):
            targets = {str(folder / name): f"{root}/{path}/{name}" for name in names}
            for parent in {target.rsplit("/", 1)[0] for target in targets.values()}:
                system.makedirs(parent, exist_ok=True)
            system.put([*targets], [*targets.values()])

    def download(self, path: str, names: Iterable[str], folder: Path) -> None:
        """Copy files of a folder here into a local one, and none to anywhere else.

        Raises:
            CheckpointError: one is missing, or its name leads out of the folder.
        """
        targets = {f"{path}/{name}": (folder / name).resolve() for name in names}
        for name, target in targets.items():
            if not target.is_relative_to(folder.resolve()):
                raise CheckpointError(f"{self.uri}/{name} is no place for a file")
            target.parent.mkdir(parents=True, exist_ok=True)
        with self._system() as (system, root):
            system.get([f"{root}/{name}" for name in targets], [*map(str, targets.values())])

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and what it holds, if there is one."""
        with self._system() as (system, root), contextlib.suppress(FileNotFoundError):
            system.rm(f"{root}/{path}", recursive=True)
