"""Artifacts on disk: committed whole, hashed, keyed by what made them, computed once.

An artifact is a folder. `commit_dir` stages it beside its final place, writes `manifest.json`
(path, size and SHA-256 of every file) last and renames it in, so a folder that has a manifest is
complete. `Store` keys artifacts by the hash of their inputs, and `Store.get` makes each one once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import rsllm
from rsllm.errors import CheckpointError, ConfigError
from rsllm.settings import content_hash

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; a crash leaves the old file or the new one, never half of it."""
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    staging.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
    _fsync(staging)
    staging.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def require_writable(folder: Path, purpose: str, remedy: str) -> None:
    """Create a folder and prove that it can be written.

    Raises:
        ConfigError: it cannot; the message ends in the remedy.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{purpose} {folder} cannot be written ({error.strerror}); {remedy}"
        ) from error


@contextlib.contextmanager
def commit_dir(final: Path, **facts: Any) -> Iterator[Path]:
    """Yield a staging folder that becomes `final`, with a manifest of its files and `facts`.

    A crash or an exception leaves no `final`. If another process committed the same folder
    meanwhile, that one stays and this one is dropped. What processes that were killed staged for
    the same folder on this machine is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # Process ids mean the same on one machine, and in one container of it.
    host = content_hash([platform.node(), Path("/proc/self/ns/pid").resolve().name])[:8]
    for left in final.parent.glob(f".{final.name}.{host}-*.staging"):
        try:
            with contextlib.suppress(PermissionError):  # it lives, as another user's
                os.kill(int(left.name.split("-")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
    owner, unique = f"{host}-{os.getpid()}", uuid.uuid4().hex[:8]
    staging = final.with_name(f".{final.name}.{owner}-{unique}.staging")
    staging.mkdir()
    try:
        yield staging
        seal(staging, facts)
        try:
            staging.rename(final)
        except OSError:
            if not (final / MANIFEST).exists():
                raise
        _fsync(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Flush every file of a folder, then write its manifest; a sealed folder is complete."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _fsync(path)
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        files[name] = {"bytes": size, "sha256": sha256(path)}
    whole = {name: fact for name, fact in facts.items() if name != "digest"} | {"files": files}
    write_json(folder / MANIFEST, {**whole, "digest": content_hash(whole)})
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """The manifest of a committed folder, its files checked by size and, on `verify`, by hash.

    Raises:
        CheckpointError: no manifest, or a file that is missing, elsewhere, extra-short or altered.
    """
    facts: dict[str, Any] = read_json(folder / MANIFEST)
    stated = facts.pop("digest", None) if isinstance(facts, dict) else None
    if stated not in (None, content_hash(facts)):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} was altered; delete it to rebuild")
    try:
        files = [(name, file["bytes"], file["sha256"]) for name, file in facts["files"].items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} lists no files") from error
    for name, size, digest in files:
        path = folder / name
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder} is damaged: {name} is not in it; delete it to rebuild")
        if path.stat().st_size != size or (verify and sha256(path) != digest):
            raise CheckpointError(f"{folder} is damaged: {name} was altered; delete it to rebuild")
    return facts


def provenance() -> dict[str, Any]:
    """What made a result: versions, machine and time. No environment: it holds secrets."""
    packages = ("torch", "transformers", "peft", "deepspeed", "ray", "optuna", "numpy")
    return {
        "rsllm": rsllm.__version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass(frozen=True)
class Store:
    """Content-addressed artifacts under one folder that every node of the cluster can see."""

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Open (or create) a store after proving that it can be written.

        Raises:
            ConfigError: the folder cannot be created or written.
        """
        path = Path(root).expanduser().absolute()
        require_writable(path, "storage", "choose another with --storage")
        return cls(path)

    def path(self, kind: str, inputs: Any) -> Path:
        """Where the artifact of `kind` made from `inputs` (JSON-ready) lives."""
        return self.root / kind / content_hash({"version": rsllm.__version__, "inputs": inputs})

    def get(self, kind: str, inputs: Any, make: Callable[[Path], Any]) -> Path:
        """The artifact's folder; `make(staging)` fills it if it does not exist yet."""
        path = self.path(kind, inputs)
        if not (path / MANIFEST).exists():
            with self.alone(f"{kind}-{path.name}", waits=True):
                self._make(path, make, kind=kind, inputs=inputs)
        manifest(path)
        return path

    def _make(self, path: Path, make: Callable[[Path], Any], **facts: Any) -> None:
        if not (path / MANIFEST).exists():
            with commit_dir(path, **facts, provenance=provenance()) as staging:
                make(staging)

    @contextlib.contextmanager
    def alone(self, name: str, *, waits: bool) -> Iterator[None]:
        """Keep others from the same work while the block runs; who dies, lets go.

        Raises:
            ConfigError: another process is at it, and this one does not wait.
        """
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(exist_ok=True)
        holder, lock = path.with_suffix(".holder"), FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            if not waits:
                raise ConfigError(f"{who} runs {name} already; let it end or end it") from None
            print(f"rsllm: waiting for {who}, which makes {name}", flush=True)
            lock.acquire()
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {platform.node()} (since {since})")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()
