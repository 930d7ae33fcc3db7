"""Artifacts: committed whole, hashed, keyed by what made them, computed once.

An artifact is a folder. `commit_dir` stages it beside its final place, writes `manifest.json`
(path, size and SHA-256 of every file) last and renames it in, so a folder that has a manifest is
complete. `Mirror` keeps such folders on a disk or at a URI. `Store` keys artifacts by the hash of
their inputs, and `Store.get` makes each one once.
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

import platformdirs
from filelock import FileLock, Timeout

import rsllm
from rsllm.config.plain import content_hash
from rsllm.errors import CheckpointError, ConfigError
from rsllm.store.remote import Remote
from rsllm.store.versions import decided_by

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Return the folder of what a node fetched: `$RSLLM_CACHE`, or the user's cache folder."""
    root = Path(os.environ.get("RSLLM_CACHE") or platformdirs.user_cache_path("rsllm"))
    return root.expanduser().absolute()


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
        reason = f"{purpose} {folder} cannot be written ({error.strerror}); {remedy}"
        raise ConfigError(reason) from error


@contextlib.contextmanager
def commit_dir(final: Path, **facts: Any) -> Iterator[Path]:
    """Yield a staging folder that becomes `final`, with a manifest of its files and `facts`.

    A crash or an exception leaves no `final`. If another process committed the same folder
    meanwhile, that one stays and this one is dropped. What processes that were killed staged for
    the same folder on this machine is removed.
    """
    with staged(final) as staging:
        yield staging
        seal(staging, facts)


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a staging folder that becomes `final` as it is; see `commit_dir`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{final.name}.{_host()}-*.staging"):
        try:
            with contextlib.suppress(PermissionError):  # it lives, as another user's
                os.kill(int(left.name.split("-")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
    staging = _beside(final)
    staging.mkdir()
    try:
        yield staging
        try:
            staging.rename(final)
        except OSError:
            if not (final / MANIFEST).exists():
                raise
        _fsync(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _beside(final: Path) -> Path:
    """A path beside a folder, where this process may stage what comes to it or put it aside."""
    return final.with_name(f".{final.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.staging")


def _host() -> str:
    """A name of the machine, and of its container, within which process ids mean the same."""
    return content_hash([platform.node(), Path("/proc/self/ns/pid").resolve().name])[:8]


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
    facts, files = _read_manifest(folder)
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder} is damaged: {name} is not in it; delete it to rebuild")
        if path.stat().st_size != size or (verify and sha256(path) != digest):
            raise CheckpointError(f"{folder} is damaged: {name} was altered; delete it to rebuild")
    return facts


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """A folder's manifest, checked by its digest, and the size and hash of each file in it."""
    facts: dict[str, Any] = read_json(folder / MANIFEST)
    digest = facts.pop("digest", None) if isinstance(facts, dict) else None
    if digest not in (None, content_hash(facts)):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} was altered; delete it to rebuild")
    try:
        files = {name: (file["bytes"], file["sha256"]) for name, file in facts["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} lists no files") from error
    return facts, files


def not_on_storage(location: str) -> ConfigError:
    """Return the error for an artifact that this node cannot see."""
    return ConfigError(
        f"{location} is not on storage that {platform.node()} sees; give --storage a folder that"
        " every node of the cluster mounts, or a URI, such as s3://bucket/path"
    )


def provenance() -> dict[str, Any]:
    """The versions, machine and time that made a result; not the environment: it holds secrets."""
    packages = ("torch", "transformers", "peft", "deepspeed", "ray", "optuna", "numpy")
    return {
        "rsllm": rsllm.__version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass(frozen=True)
class Mirror:
    """Committed folders by name: in a local folder, or at a URI with a copy on nodes that need one.

    Renaming is not atomic at a URI. There, files lie below their manifest's digest, so that two who
    upload one name at the same time do not mix theirs, and a folder is there once its manifest is,
    which comes last.
    """

    location: str
    """The local folder, or the URI."""

    @property
    def remote(self) -> Remote | None:
        """The files at the URI, if the location is one."""
        return Remote(self.location) if "://" in self.location else None

    @property
    def root(self) -> Path:
        """The local folder, or this node's for copies."""
        scheme, separator, path = self.location.partition("://")
        return cache_root() / "stores" / scheme / path.lstrip("/") if separator else Path(scheme)

    def below(self, name: str) -> str:
        """Return the location of one of the folders."""
        return f"{self.location}/{name}"

    def names(self) -> list[str]:
        """Return the names of all folders, sorted; at a URI, of those that are complete."""
        if self.remote is None:
            return sorted(path.name for path in self.root.glob("[!.]*"))
        return [name for name in self.remote.names() if self.remote.read(f"{name}/{MANIFEST}")]

    def fetch(self, name: str) -> bool:
        """Tell whether there is such a folder; a copy is on this node then, compared hash by hash.

        Raises:
            CheckpointError: what is at the URI is damaged.
        """
        final = self.root / name
        if self.remote is None:
            return (final / MANIFEST).exists()
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{final.name}.lock")):
            content, copied = self.remote.read(f"{name}/{MANIFEST}"), final / MANIFEST
            if content is None:
                return False
            if copied.exists() and copied.read_bytes() == content:
                return True
            shutil.rmtree(final, ignore_errors=True)
            with staged(final) as staging:
                (staging / MANIFEST).write_bytes(content)
                try:
                    facts, files = _read_manifest(staging)
                    self.remote.download(f"{name}/{content_hash(facts)}", files, staging)
                    manifest(staging, verify=True)
                except CheckpointError as error:
                    text = str(error).replace(str(staging), self.below(name))
                    raise CheckpointError(text) from error
        return True

    def upload(self, name: str, folder: Path) -> None:
        """Put a sealed folder to the URI, if it is one."""
        if self.remote is not None:
            facts, files = _read_manifest(folder)
            self.remote.upload(folder, files, f"{name}/{content_hash(facts)}")
            self.remote.upload(folder, [MANIFEST], name)

    def share(self, name: str) -> None:
        """Put a folder for people, such as a report, to the URI, if it is one, as it is."""
        if self.remote is not None:
            files = [path for path in (self.root / name).rglob("*") if path.is_file()]
            names = [path.relative_to(self.root / name).as_posix() for path in files]
            self.remote.upload(self.root / name, names, name)

    def remove(self, name: str) -> None:
        """Remove a folder, at once as others see it; what cannot be removed stays."""
        if self.remote is not None:
            with contextlib.suppress(CheckpointError):
                self.remote.remove(f"{name}/{MANIFEST}")
                self.remote.remove(name)
        aside = _beside(self.root / name)
        with contextlib.suppress(OSError):
            (self.root / name).rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Store(Mirror):
    """Content-addressed artifacts, KIND/KEY, in a folder that all nodes see, or at a URI."""

    @classmethod
    def at(cls, location: str | Path) -> Store:
        """Return a store to read from, which may not be there."""
        text = str(location)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute()))

    @classmethod
    def open(cls, location: str | Path) -> Store:
        """Open (or create) a store after proving that it can be written.

        Raises:
            ConfigError: it cannot, or the package is missing that reaches the URI.
        """
        remedy, store = "choose another with --storage", cls.at(location)
        if store.remote is not None:
            store.remote.require_writable(remedy)
        require_writable(store.root, "storage", remedy)
        return store

    def path(self, kind: str, inputs: Any) -> Path:
        """This node's path of the artifact of `kind` made from `inputs` (JSON-ready)."""
        return self.root / kind / content_hash(decided_by(kind, inputs))

    def name(self, path: Path) -> str:
        """Return the name, KIND/KEY, by which all nodes know an artifact."""
        return "/".join(path.parts[-2:])

    def local(self, path: str | Path) -> Path:
        """This node's path of an artifact that has `path` on another node; fetched if need be.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: this node does not see it.
        """
        here = self.root / self.name(Path(path))
        if not self.holds(here):
            raise not_on_storage(self.below(self.name(here)))
        return here

    def holds(self, path: Path) -> bool:
        """Tell whether an artifact exists; if so it is on this node now."""
        return (path / MANIFEST).exists() or self.fetch(self.name(path))

    def get(self, kind: str, inputs: Any, make: Callable[[Path], Any]) -> Path:
        """Return the artifact's folder; `make(staging)` fills it if it does not exist yet."""

        def commit() -> None:
            with self.commit(kind, inputs) as staging:
                make(staging)

        return self.ensure(self.path(kind, inputs), commit)

    def ensure(self, path: Path, commit: Callable[[], Any]) -> Path:
        """The artifact's folder; `commit()`, perhaps on another node, if it does not exist yet."""
        if not (path / MANIFEST).exists():
            with self.lock(f"{path.parent.name}-{path.name}", wait=True):
                if not self.holds(path):
                    commit()
                    self.holds(path)
        manifest(path)
        return path

    @contextlib.contextmanager
    def commit(self, kind: str, inputs: Any) -> Iterator[Path]:
        """Yield a staging folder that becomes the artifact, at the URI before it does here."""
        path = self.path(kind, inputs)
        with staged(path) as staging:
            yield staging
            seal(staging, {"kind": kind, "provenance": provenance(), **decided_by(kind, inputs)})
            self.upload(self.name(path), staging)

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[None]:
        """Hold the lock `name` while the block runs; it is released when the process dies.

        Under a URI it keeps out only processes of the same machine.

        Raises:
            ConfigError: another process is at it, and this one does not wait.
        """
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        note, file_lock = path.with_suffix(".holder"), FileLock(path)
        try:
            file_lock.acquire(timeout=0)
        except Timeout:
            who = self.holder(name) or "another process"
            if not wait:
                raise ConfigError(f"{who} runs {name} already; let it end or end it") from None
            print(f"rsllm: waiting for {who}, which makes {name}", flush=True)
            file_lock.acquire()
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            note.write_text(f"process {os.getpid()} on {platform.node()} (since {since})")
            yield
        finally:
            note.unlink(missing_ok=True)
            file_lock.release()

    def holder(self, name: str) -> str:
        """Return the process that holds a lock; empty if none on this machine does any more."""
        path = self.root / "locks" / f"{name}.lock"
        try:
            if path.exists():
                FileLock(path).acquire(timeout=0).lock.release()
            return ""
        except (Timeout, PermissionError):
            text = path.with_suffix(".holder")
            return text.read_text() if text.exists() else "another process"
