"""What a store holds: listed, shown, compared, and cleared of what nothing will read again."""

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
from rsllm.store.artifacts import MANIFEST, Mirror, Store, manifest
from rsllm.store.versions import VERSIONS

KINDS = tuple(VERSIONS)
DAY, MIB = 86400.0, 1024**2
SHOWN = ("samples", "seconds", "MRR", "HR@1", "HR@5", "NDCG@10")
"""Of the validation that an artifact's weights had."""
NONSENSE = (
    CheckpointError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a file raises in which a stranger wrote it."""
OUTCOMES = {"results.json", "page.html"}
"""Of a study, and of a paper's tables."""
MOST = 4
"""Settings in a line of the list."""


@dataclass(frozen=True)
class Artifact:
    """What its manifest and learning curve say."""

    name: str
    """KIND/KEY."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All that decides it, by dotted paths."""
    keys: frozenset[str] = frozenset()
    """Of what it was made of, among others."""
    made: dict[str, Any] = field(default_factory=dict)
    """When, of which versions of the code and of packages, on what."""
    days: float = 0.0
    """Since then."""
    files: dict[str, int] | None = None
    """Their bytes; without any it is damaged."""
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def mebibytes(self) -> float:
        """Of its files."""
        return sum((self.files or {}).values()) / MIB

    def is_of(self, other: Artifact) -> bool:
        """Whether the other one is among what it was made of."""
        return _key(other) in self.keys


def artifacts(store: Store) -> list[Artifact]:
    """All of a store's, kind by kind, the oldest first; nothing but manifests and curves is read.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: something cannot be read, such as another user's.
    """
    if store.remote is None and not store.root.is_dir():
        raise ConfigError(f"{store.location} is no store; name one with --storage")
    names = [
        f"{kind}/{key}"
        for kind in KINDS
        for key in _names(store, kind)
        if re.fullmatch("[0-9a-f]{16}", key) and not (store.root / kind).is_symlink()
    ]
    found = [one for name in names if (one := _read(store, name))]
    return sorted(found, key=lambda one: (KINDS.index(_kind(one)), -one.days))


def listing(store: Store) -> str:
    """Tables of artifacts, of runs that have not ended, and of studies."""
    found, rows = artifacts(store), []
    for _, group in itertools.groupby(found, _kind):
        kind = list(group)
        varies = _varying([one.settings for one in kind])
        for one in kind:
            told = [f"{path}={_word(one.settings.get(path), 4)}" for path in varies[:MOST]]
            more = ["..."] if len(varies) > MOST else []
            what = " ".join([*told, *more]) if one.files else "damaged"
            rows.append(
                [one.name, one.made.get("time"), one.mebibytes, one.validation.get("MRR"), what]
            )
    ended = _runs(found)
    runs = [(name, _state(store, name)) for name in _names(store, "running") if name not in ended]
    studies = [
        (name, "there" if OUTCOMES & {*_names(store, f"studies/{name}")} else "none yet")
        for name in _names(store, "studies")
    ]
    header = ["artifact", "made (UTC)", "MiB", "MRR", "differs from its kind in"]
    return _joined(
        tabulate(rows, header, floatfmt=("", "", ".1f", ".3f", "")) if rows else "no artifacts",
        tabulate(runs, ["run that has not ended", "state"], disable_numparse=True) if runs else "",
        tabulate(studies, ["study", "results"], disable_numparse=True) if studies else "",
    )


def details(store: Store, name: str) -> str:
    """All that decides an artifact, what it was made of, how good it was, and its files."""
    found = artifacts(store)
    one = _find(found, name, store)
    facts = {
        "made of": " ".join(other.name for other in found if one.is_of(other)),
        "made from it": " ".join(other.name for other in found if other.is_of(one)),
        **{metric: _word(value) for metric, value in one.validation.items()},
        **{path: _word(value) for path, value in one.made.items()},
    }
    settings = [(path, _word(value)) for path, value in one.settings.items()]
    return _joined(
        f"{store.below(one.name)}{'' if one.files else ' is damaged'}",
        tabulate(facts.items(), tablefmt="plain", disable_numparse=True),
        tabulate(settings, ["decided by", "value"], disable_numparse=True),
        tabulate((one.files or {}).items(), ["file", "bytes"]),
    )


def difference(store: Store, first: str, second: str) -> str:
    """What two artifacts differ in: settings, sources, versions, and how good they were."""
    found = artifacts(store)
    both = [_find(found, name, store) for name in (first, second)]
    facts = [one.settings | one.made | one.validation for one in both]
    rows = [[path, *(_word(side.get(path)) for side in facts)] for path in _varying(facts)]
    header = ["differs in", *(one.name for one in both)]
    if not rows:
        return f"{both[0].name} and {both[1].name} differ in nothing"
    return _joined(tabulate(rows, header, disable_numparse=True))


def clear(store: Store, *, days: float | None, remove: bool) -> str:
    """A table of what nothing will read again; it is removed if told so.

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
    found = artifacts(store)
    size = {one.name: one.mebibytes for one in found if one.files}
    reasons = dict([*_left_behind(store, found, days), *_needless(store, found, days)])
    rows = [(n, size.get(n) or _mebibytes(store.root / n), why) for n, why in reasons.items()]
    if not rows:
        return "nothing to remove"
    for name in reasons if remove else ():
        store.remove(name)
    left = [name for name in reasons if remove and _is_there(store, name)]
    require(not left, f"{', '.join(left)} cannot be removed; see whose they are")
    total = f"{sum(row[1] for row in rows):.1f} MiB"
    end = f"{total} removed" if remove else f"{total} could be removed: --yes does it"
    return _joined(tabulate(rows, ["what", "MiB", "why"], floatfmt=".1f"), end)


def _needless(
    store: Store, found: Sequence[Artifact], days: float | None
) -> Iterator[tuple[str, str]]:
    """Artifacts that can go, and why; by age none while a run may read it that has not ended."""
    yield from ((one.name, "damaged") for one in found if not one.files)
    unfinished = {*_names(store, "running")} - _runs(found)
    if days is None or any(_untouched(store.root / "running" / n) < days for n in unfinished):
        return
    sound = [one for one in found if one.files]
    other = {one.name for one in sound if one.made.get("version") != VERSIONS[_kind(one)]}
    kept = {
        one.name: one
        for one in sound
        if one.days < days or (_kind(one) == "evaluation" and one.name not in other)
    }
    reached = list(kept.values())
    for one in reached:  # which grows
        sources = [source for source in sound if one.is_of(source) and source.name not in kept]
        kept |= {source.name: source for source in sources}
        reached += sources
    for one in sound:
        if one.name not in kept:
            by = ", by other code" if one.name in other else ""
            yield one.name, f"{one.days:.0f} days old{by}, nothing that stays was made of it"


def _left_behind(
    store: Store, found: Sequence[Artifact], days: float | None
) -> Iterator[tuple[str, str]]:
    """Folders of runs that can go, and why."""
    ended = _runs(found)
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


def _runs(found: Sequence[Artifact]) -> set[str]:
    """The names of the runs that made them; what is damaged will be made again."""
    return {one.name.replace("/", "-") for one in found if one.files}


def _is_there(store: Store, name: str) -> bool:
    folder, _, last = name.rpartition("/")
    return (store.root / name).exists() or last in _names(store, folder)


def _untouched(folder: Path) -> float:
    """Days since anything in it changed."""
    return (time.time() - max((stat.st_mtime for stat in _stats(folder)), default=0)) / DAY


def _mebibytes(folder: Path) -> float:
    return sum(stat.st_size for stat in _stats(folder)) / MIB


def _stats(folder: Path) -> list[os.stat_result]:
    """Of all that is in a folder, as long as it is there."""
    found = []
    with contextlib.suppress(OSError):
        for path in (folder, *folder.rglob("*")):
            found.append(path.lstat())
    return found


def _read(store: Store, name: str) -> Artifact | None:
    stated = _bytes(store, f"{name}/{MANIFEST}")
    if stated is None:
        return None
    try:
        facts = json.loads(stated)
        inputs, made = facts.get("inputs", {}), dict(flat(facts.get("provenance", {})))
        when = timegm(time.strptime(made["time"], "%Y-%m-%dT%H:%M:%SZ")) if made else 0
        made["version"] = facts.get("version")
        files = {file: int(fact["bytes"]) for file, fact in facts["files"].items()}
        keys = frozenset(re.findall(r"\b[0-9a-f]{16}\b", json.dumps(inputs)))
        if store.remote is None:
            manifest(store.root / name)
        days = (time.time() - when) / DAY
        one = Artifact(name, dict(flat(inputs)), keys, made, days, files)
    except NONSENSE:
        return Artifact(name)
    place = f"{name}/{facts.get('digest')}" if store.remote else name
    return replace(one, validation=_validation(name, _bytes(store, f"{place}/training.json")))


def _validation(name: str, training: bytes | None) -> dict[str, float]:
    """Of a recommender's best epoch, or of the end of a language model's training."""
    try:
        curve = json.loads(training or b"{}").get("curve") or [{}]
        best = max(curve, key=lambda entry: float(entry.get("MRR", 0)))
        kept = best if name.startswith("recommender/") else curve[-1]
        return {metric: float(kept[metric]) for metric in SHOWN if metric in kept}
    except NONSENSE:
        return {}


def _find(found: Sequence[Artifact], name: str, store: Store) -> Artifact:
    """The one that a path, a name, a key, or the beginning of either means.

    Raises:
        ConfigError: none, or more than one.
    """
    asked = "/".join(Path(name).parts[-2:])
    meant = [
        one
        for one in found
        if asked and (one.name.startswith(asked) or _key(one).startswith(asked))
    ]
    if len(meant) != 1:
        several = ", ".join(one.name for one in meant) or "nothing"
        text = f"{name} means {several} in {store.location}; see rsllm runs ls"
        raise ConfigError(_joined(text))
    return meant[0]


def _state(store: Store, run: str) -> str:
    steps = [name for name in _names(store, f"running/{run}") if name.startswith("step-")]
    reached = f"checkpoint {max(steps)}" if steps else "no checkpoint"
    return f"{reached}, {store.holder(run) or 'nobody at it'}"


def _names(store: Store, folder: str) -> list[str]:
    """What a folder of the store holds, complete or not."""
    below = Mirror(store.below(folder))
    return below.remote.names() if below.remote else below.names()


def _bytes(store: Store, path: str) -> bytes | None:
    """Of a file, if there is one."""
    if store.remote is not None:
        return store.remote.read(path)
    try:
        return (store.root / path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{store.root / path} cannot be read: {error.strerror}") from error


def _kind(one: Artifact) -> str:
    return one.name.partition("/")[0]


def _key(one: Artifact) -> str:
    return one.name.rpartition("/")[2]


def _varying(sides: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths whose values are not the same everywhere."""
    paths = dict.fromkeys(path for side in sides for path in side)
    return [path for path in paths if len({_word(side.get(path)) for side in sides}) > 1]


def _word(value: Any, digits: int = 0) -> str:
    """A value, exactly or of so many digits."""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if digits else repr(value)
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _joined(*tables: str) -> str:
    """For a terminal, which no character of it can command."""
    text = "\n\n".join(filter(None, tables))
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
