"""Lists, shows and compares what a store holds, and clears it of what nothing will read again."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import time
from calendar import timegm
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rsllm.config.plain import flat
from rsllm.errors import CheckpointError, ConfigError, require
from rsllm.evaluate.metrics import brief_metrics
from rsllm.store.artifacts import MANIFEST, Mirror, Store, manifest
from rsllm.store.remote import Remote
from rsllm.store.versions import VERSIONS

DAY, MIB = 86400.0, 1024**2
MALFORMED = (
    *(CheckpointError, LookupError, ValueError, TypeError),
    *(AttributeError, ArithmeticError, RecursionError),
)
"""Errors that a damaged or foreign manifest, or a learning curve, can raise."""
OUTCOMES = {"results.json", "page.html"}
"""Files that a study, or a paper's tables, has once it ended."""
MOST = 4
"""How many settings a line of the list has room for."""


@dataclass(frozen=True)
class Artifact:
    """An artifact as its manifest and its learning curve describe it."""

    name: str
    """KIND/KEY."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All that decides it, by dotted paths."""
    source_keys: frozenset[str] = frozenset()
    """The keys of the artifacts it was made from, and whatever else looks like a key."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """When it was made, by which versions of the code and of packages, on what."""
    days: float = 0.0
    """Its age."""
    files: dict[str, int] | None = None
    """The bytes of each file; None if the artifact is damaged."""
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    @property
    def key(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def is_current(self) -> bool:
        return self.provenance.get("version") == VERSIONS[self.kind]

    def is_made_from(self, other: Artifact) -> bool:
        return other.key in self.source_keys

    @property
    def mebibytes(self) -> float:
        return sum((self.files or {}).values()) / MIB


def read_artifacts(store: Store) -> list[Artifact]:
    """All artifacts, kind by kind, the oldest first; nothing but manifests and curves is read.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: something cannot be read, such as another user's.
    """
    if store.remote is None and not store.root.is_dir():
        raise ConfigError(f"{store.location} is no store; name one with --storage")
    names = [
        f"{kind}/{key}"
        for kind in VERSIONS
        for key in _names(store, kind)
        if re.fullmatch("[0-9a-f]{16}", key) and not (store.root / kind).is_symlink()
    ]
    artifacts = [artifact for name in names if (artifact := _read(store, name))]
    return sorted(
        artifacts, key=lambda artifact: ([*VERSIONS].index(artifact.kind), -artifact.days)
    )


def contents(store: Store) -> dict[str, Any]:
    """Artifacts, where each run that has not ended is and who is at it, and which studies ended."""
    artifacts, runs = read_artifacts(store), {}
    for name in sorted({*_names(store, "running")} - {*_runs(artifacts)}):
        steps = [s for s in _names(store, f"running/{name}") if s.startswith("step-")]
        runs[name] = {"checkpoint": max(steps, default=None), "holder": store.holder(name) or None}
    studies = {
        name: {"ended": bool(OUTCOMES & {*_names(store, f"studies/{name}")})}
        for name in _names(store, "studies")
    }
    return {"artifacts": artifacts, "unfinished": runs, "studies": studies}


def listing(store: Store) -> str:
    """Return tables of artifacts, of runs that have not ended, and of studies."""
    found, rows = contents(store), []
    groups = itertools.groupby(found["artifacts"], lambda artifact: artifact.kind)
    for kind in (list(group) for _, group in groups):
        varies = _varying([artifact.settings for artifact in kind])
        for artifact in kind:
            words = [f"{path}={_word(artifact.settings.get(path), 4)}" for path in varies[:MOST]]
            words += ["..."] if len(varies) > MOST else []
            differs = " ".join(words) if artifact.files else "damaged"
            time_made, mrr = artifact.provenance.get("time"), artifact.validation.get("MRR")
            rows.append([artifact.name, time_made, artifact.mebibytes, mrr, differs])
    header = ["artifact", "made (UTC)", "MiB", "MRR", "differs from its kind in"]
    usual = tabulate(rows, header, floatfmt=("", "", ".1f", ".3f", "")) if rows else "no artifacts"
    states = {
        name: f"{run['checkpoint'] or 'no checkpoint'}, {run['holder'] or 'nobody at it'}"
        for name, run in found["unfinished"].items()
    }
    studies = {
        n: "there" if study["ended"] else "none yet" for n, study in found["studies"].items()
    }
    others = ((states, ["run that has not ended", "state"]), (studies, ["study", "results"]))
    return _for_terminal(
        usual,
        *(tabulate(told.items(), head, disable_numparse=True) for told, head in others if told),
    )


def details(store: Store, name: str) -> str:
    """Return tables of all that decides an artifact, its sources, its scores and its files."""
    artifacts = read_artifacts(store)
    artifact = find(artifacts, name, store)
    facts = {
        "made of": " ".join(other.name for other in artifacts if artifact.is_made_from(other)),
        "made from it": " ".join(other.name for other in artifacts if other.is_made_from(artifact)),
        **{metric: _word(value) for metric, value in artifact.validation.items()},
        **{path: _word(value) for path, value in artifact.provenance.items()},
    }
    settings = [(path, _word(value)) for path, value in artifact.settings.items()]
    return _for_terminal(
        f"{store.below(artifact.name)}{'' if artifact.files else ' is damaged'}",
        tabulate(facts.items(), tablefmt="plain", disable_numparse=True),
        tabulate(settings, ["decided by", "value"], disable_numparse=True),
        tabulate((artifact.files or {}).items(), ["file", "bytes"]),
    )


def difference(store: Store, first: str, second: str) -> str:
    """A table of the settings, sources, versions and scores in which two artifacts differ."""
    artifacts = read_artifacts(store)
    both = [find(artifacts, name, store) for name in (first, second)]
    facts = [artifact.settings | artifact.provenance | artifact.validation for artifact in both]
    rows = [[path, *(_word(side.get(path)) for side in facts)] for path in _varying(facts)]
    header = ["differs in", *(artifact.name for artifact in both)]
    if not rows:
        return f"{both[0].name} and {both[1].name} differ in nothing"
    return _for_terminal(tabulate(rows, header, disable_numparse=True))


def clear(store: Store, *, days: float | None, remove: bool) -> str:
    """Return a table of what nothing will read again; it is removed if told so.

    That is what is damaged, checkpoints of runs that ended, and what was left half-written a day
    ago. What was ever judged stays, and what it was made of.

    Args:
        days: if given also artifacts that old of which nothing younger was made, those of other
            code, and checkpoints and notes of Ray that nothing has touched for so long.
        remove: or only look.

    Raises:
        ConfigError: days that are none or, at a URI, any, since nobody knows there who uses what;
            something runs on the store, or cannot be removed.
    """
    require(days is None or days >= 0, f"--older-than {days} is no number of days; give 0 or more")
    require(days is None or not store.remote, "--older-than is for folders; a bucket has its rules")
    for lock in sorted((store.root / "locks").glob("*.lock")) if remove else ():
        who = store.holder(lock.stem)
        require(not who, f"{who} runs {lock.stem}; clear {store.location} when nothing runs on it")
    artifacts = read_artifacts(store)
    size = {artifact.name: artifact.mebibytes for artifact in artifacts if artifact.files}
    reasons = dict([*_left_behind(store, artifacts, days), *_needless(store, artifacts, days)])
    rows = []
    for name, why in reasons.items():
        used = sum(stat.st_size for stat in _stats(store.root / name)) / MIB
        rows.append((name, size.get(name) or used, why))
    if not rows:
        return "nothing to remove"
    left = []
    for name in reasons if remove else ():
        store.remove(name)
        folder, _, last = name.rpartition("/")
        if (store.root / name).exists() or last in _names(store, folder):
            left.append(name)
    require(not left, f"{', '.join(left)} cannot be removed; see whose they are")
    total = f"{sum(row[1] for row in rows):.1f} MiB"
    end = f"{total} removed" if remove else f"{total} could be removed: --yes does it"
    return _for_terminal(tabulate(rows, ["what", "MiB", "why"], floatfmt=".1f"), end)


def _needless(
    store: Store, artifacts: Sequence[Artifact], days: float | None
) -> Iterator[tuple[str, str]]:
    """Artifacts that can go, and why; by age none while a run may read it that has not ended."""
    yield from ((artifact.name, "damaged") for artifact in artifacts if not artifact.files)
    unfinished = {*_names(store, "running")} - _runs(artifacts)
    if days is None or any(_untouched(store.root / "running" / n) < days for n in unfinished):
        return
    sound = [one for one in artifacts if one.files]
    judged = [one for one in sound if one.kind == "evaluation" and one.is_current]
    kept = {one.name: one for one in [*judged, *(one for one in sound if one.days < days)]}
    reached = list(kept.values())
    for artifact in reached:  # the list grows while the loop runs
        sources = [one for one in sound if artifact.is_made_from(one) and one.name not in kept]
        kept |= {source.name: source for source in sources}
        reached += sources
    for one in sound:
        if one.name not in kept:
            by = "" if one.is_current else ", by other code"
            yield one.name, f"{one.days:.0f} days old{by}, nothing that stays was made of it"


def _left_behind(
    store: Store, artifacts: Sequence[Artifact], days: float | None
) -> Iterator[tuple[str, str]]:
    """Folders of runs that can go, and why."""
    ended = _runs(artifacts)
    for name in _names(store, "running"):
        if name in ended:
            yield f"running/{name}", "checkpoints of a run that ended"
        elif days is not None and _untouched(store.root / "running" / name) >= days:
            yield f"running/{name}", f"untouched for {days:g} days"
    for path in (*store.root.glob("*/.*.staging"), *store.root.glob("running/*/.*.staging")):
        if _untouched(path) > 1:
            yield path.relative_to(store.root).as_posix(), "half-written"
    for path in store.root.glob("ray/[!.]*"):
        if days is not None and path.is_dir() and _untouched(path) >= days:
            yield f"ray/{path.name}", f"untouched for {days:g} days"


def _runs(artifacts: Sequence[Artifact]) -> set[str]:
    """Return the names of the runs that made them; what is damaged will be made again."""
    return {artifact.name.replace("/", "-") for artifact in artifacts if artifact.files}


def _untouched(folder: Path) -> float:
    """Days since anything in it changed."""
    return (time.time() - max((stat.st_mtime for stat in _stats(folder)), default=0)) / DAY


def _stats(folder: Path) -> list[os.stat_result]:
    """Return the size and time of a folder and all that is in it, as long as it is there."""
    stats = []
    with contextlib.suppress(OSError):
        for path in (folder, *folder.rglob("*")):
            stats.append(path.lstat())
    return stats


def _read(store: Store, name: str) -> Artifact | None:
    files = Remote(store.location)  # fsspec reads folders too
    stated = files.read(f"{name}/{MANIFEST}")
    if stated is None:
        return None
    try:
        facts = json.loads(stated)
        inputs, provenance = facts.get("inputs", {}), dict(flat(facts.get("provenance", {})))
        made = provenance.get("time", "1970-01-01T00:00:00Z")
        seconds = time.time() - timegm(time.strptime(made, "%Y-%m-%dT%H:%M:%SZ"))
        provenance["version"] = facts.get("version")
        sizes = {file: int(fact["bytes"]) for file, fact in facts["files"].items()}
        keys = frozenset(re.findall(r"\b[0-9a-f]{16}\b", json.dumps(inputs)))
        if store.remote is None:
            manifest(store.root / name)
        settings = dict(flat(inputs))
        artifact = Artifact(name, settings, keys, provenance, seconds / DAY, sizes)
    except MALFORMED:
        return Artifact(name)
    place = f"{name}/{facts.get('digest')}" if store.remote else name
    return replace(artifact, validation=_validation(name, files.read(f"{place}/training.json")))


def _validation(name: str, training: bytes | None) -> dict[str, float]:
    """The scores of a recommender's best epoch, or at the end of a language model's training."""
    try:
        curve = json.loads(training or b"{}").get("curve") or [{}]
        best = max(curve, key=lambda entry: float(entry.get("MRR", 0)))
        shown = ("samples", "seconds", *brief_metrics())
        kept = best if name.startswith("recommender/") else curve[-1]
        return {name: float(kept[name]) for name in shown if name in kept}
    except MALFORMED:
        return {}


def find(artifacts: Sequence[Artifact], name: str, store: Store) -> Artifact:
    """Return the artifact that a path, a name, a key, or the beginning of either means.

    Raises:
        ConfigError: none, or more than one.
    """
    start = "/".join(Path(name).parts[-2:])
    meant = [
        artifact
        for artifact in artifacts
        if start and (artifact.name.startswith(start) or artifact.key.startswith(start))
    ]
    if len(meant) != 1:
        several = ", ".join(artifact.name for artifact in meant) or "nothing"
        text = f"{name} means {several} in {store.location}; see rsllm runs ls"
        raise ConfigError(_for_terminal(text))
    return meant[0]


def _names(store: Store, folder: str) -> list[str]:
    """Return the names in a folder of the store, complete or not."""
    below = Mirror(store.below(folder))
    return below.remote.names() if below.remote else below.names()


def _varying(sides: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths whose values are not the same everywhere."""
    paths = dict.fromkeys(path for side in sides for path in side)
    return [path for path in paths if len({_word(side.get(path)) for side in sides}) > 1]


def _word(value: Any, digits: int = 0) -> str:
    """Return a value, exactly or of so many digits."""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if digits else repr(value)
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _for_terminal(*tables: str) -> str:
    """Return the tables, without any character that a terminal would take for a command."""
    text = "\n\n".join(filter(None, tables))
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
