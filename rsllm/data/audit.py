"""The audit of a prepared data set, or of a run on it: each check is a function with evidence.

A leak is what makes a score worthless, such as a future item in a history; a warning is what a
reader of the score must know.
"""

# Axes: E events, R rows, H history, C candidates, P pairs.

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from tabulate import tabulate

from rsllm.config.plain import content_hash
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, SPLITS, Catalogue, Events, Ints, Rows, Split
from rsllm.errors import CheckpointError, ConfigError, DataError
from rsllm.store.artifacts import MANIFEST, manifest, write_json

Verdict = Literal["ok", "warning", "leak", "accepted"]
HELD_OUT: tuple[Split, Split] = ("validation", "test")

ACCEPTABLE = ("time order", "own history", "order artefact", "time ties", "duplicate titles")
"""Checks of what the data are, not of what was made of them: it may be meant, as in a course."""
CHANCE = 1e-4
"""p-value below which chance is ruled out: a dozen tests a run, one false alarm in a thousand."""
SHARED_Z, SHARED = 6.0, 0.02
"""Standard errors, and share of the negatives, by which same-target rows may agree more than
others: pairs of rows are not independent, and popularity sampling by itself reaches 0.008."""
FIXED_ORDER = 0.5
"""Share of item pairs in one order for all users; chance gives at most 2 / 2**5 = 0.06."""
TIED = 0.2
MIN_SEEN, MAX_EVENTS, MAX_ORDERED, MAX_PAIRS = 5, 1000, 1 << 24, 5000
ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of one check, and its evidence."""

    check: str
    verdict: Verdict
    evidence: str


def audit(path: Path) -> list[Finding]:
    """Every check on a prepared folder, or on an artifact of the store and all it was made from.

    Raises:
        ConfigError: the folder is no artifact.
        CheckpointError: it or its data set is damaged, or the data set is missing.
    """
    path = path.resolve()
    data = PreparedData.open(_data_of(path))
    accepted = data.facts.get("accepted", [])
    findings = [*_checks(data), *ancestry(path, data)]
    return [
        replace(finding, verdict="accepted")
        if finding.check in accepted and finding.verdict != "ok"
        else finding
        for finding in findings
    ]


def accept(path: Path, checks: Sequence[str]) -> None:
    """Note in the data's manifest that what these checks find is meant.

    Raises:
        ConfigError: the folder is no artifact, or a check's finding is a fault whatever was meant.
    """
    for check in checks:
        if check not in ACCEPTABLE:
            raise ConfigError(
                f"--accept {check!r} is no finding that may be meant; choose of"
                f" {', '.join(map(repr, ACCEPTABLE))}"
            )
    folder = _data_of(path.resolve())
    facts = {name: fact for name, fact in manifest(folder).items() if name != "digest"}
    facts |= {"accepted": sorted({*facts.get("accepted", []), *checks})}
    write_json(folder / MANIFEST, {**facts, "digest": content_hash(facts)})


def _data_of(path: Path) -> Path:
    """Return the prepared folder that an artifact is, or was made from."""
    facts = manifest(path) if (path / MANIFEST).is_file() else {}
    if "inputs" not in facts:
        raise ConfigError(f"{path} is no artifact; name a folder that prepare, fit or train prints")
    data = facts["kind"] == "data"
    return path if data else path.parents[1] / "data" / str(facts["inputs"]["data"])


def _checks(data: PreparedData) -> Iterator[Finding]:
    splits = {split: data.rows(split) for split in SPLITS}
    events, timed = data.events(), data.facts["counts"].get("timed", True)
    no_times = "no times in this data"
    yield histories(splits, events)
    yield (
        time_order(splits, data.config["split"]) if timed else Finding("time order", "ok", no_times)
    )
    yield overlap(splits, data.config["split"])
    for split in HELD_OUT:
        yield from candidates(data, split)
    yield own_history(splits, data)
    yield order_artefact(events)
    yield time_ties(events) if timed else Finding("time ties", "ok", no_times)
    yield duplicate_titles(data)


def refuse_leaks(findings: Sequence[Finding]) -> None:
    """Raise if there is a leak.

    Raises:
        DataError: names the checks that found one.
    """
    leaks = [finding.check for finding in findings if finding.verdict == "leak"]
    if leaks:
        raise DataError(f"{len(leaks)} of {len(findings)} checks found a leak: {', '.join(leaks)}")


def table(findings: Sequence[Finding]) -> str:
    """Return the findings for the terminal."""
    return tabulate(map(asdict, findings), headers="keys")


def histories(splits: dict[Split, Rows], events: Events) -> Finding:
    """Every history is what the user did just before the target, and nothing later."""
    wrong = late = total = 0
    for rows in splits.values():
        start_R = np.searchsorted(events.user_E, rows.user_R)
        age_H = np.arange(rows.history_RH.shape[1])
        for part in np.array_split(np.arange(len(rows)), 1 + len(rows) // ROWS_AT_ONCE):
            some = rows.take(part)
            target_R = (start_R[part] + some.position_R).clip(max=len(events.item_E) - 1)
            real_RH = age_H < some.length_R[:, None]
            event_RH = np.where(real_RH, (target_R - some.length_R)[:, None] + age_H, 0).clip(0)
            other_RH = real_RH & (events.item_E[event_RH] != some.history_RH)
            other_R = (
                (events.user_E[target_R] != some.user_R)
                | (events.item_E[target_R] != some.target_R)
                | (events.time_E[target_R] != some.time_R)
                | (some.length_R != np.minimum(some.position_R, len(age_H)))
            )
            late += int((real_RH & (events.time_E[event_RH] > some.time_R[:, None])).sum())
            wrong += int((other_RH.any(axis=1) | other_R).sum())
        total += len(rows)
    evidence = (
        f"{wrong:,} of {total:,} rows are not the user's events before the target;"
        f" {late:,} history items are later than it"
    )
    return Finding("histories", "leak" if wrong or late else "ok", evidence)


def time_order(splits: dict[Split, Rows], protocol: str) -> Finding:
    """Whether training looks past the first held-out target; only a split in time rules it out."""
    first = min(int(splits[split].time_R.min()) for split in HELD_OUT)
    share = float((splits["train"].time_R >= first).mean())
    by_time = protocol == "time"
    verdict: Verdict = "ok" if not share else "leak" if by_time else "warning"
    note = "" if by_time else f" (a property of {protocol} splits)"
    evidence = f"{share:.1%} of training targets follow a held-out one{note}"
    return Finding("time order", verdict, evidence)


def overlap(splits: dict[Split, Rows], protocol: str) -> Finding:
    """No row is in two splits; no user either, where users are split."""
    by_user = protocol in ("user", "given")
    keys = [r.user_R.astype(np.int64) << 32 | r.position_R * (not by_user) for r in splits.values()]
    shared = sum(len(np.intersect1d(*pair)) for pair in itertools.combinations(keys, 2))
    what = "users" if by_user else "rows"
    beyond = 0
    if protocol == "leave-one-out":
        train, held = splits["train"], splits["validation"]
        limit = pd.Series(held.position_R, held.user_R).groupby(level=0).min()
        limit_R = limit.reindex(train.user_R).fillna(2**31).to_numpy()
        beyond = int((train.position_R >= limit_R).sum())
    evidence = f"{shared:,} {what} in two splits, {beyond:,} training targets behind held-out ones"
    return Finding("overlap", "leak" if shared or beyond else "ok", evidence)


def candidates(data: PreparedData, split: Split) -> Iterator[Finding]:
    """Sets hold the target once and no two equal titles, and do not tell which one it is."""
    name, keys_I = f"{split} candidates", data.catalogue.title_keys_I
    draws = [data.rows(split, draw) for draw in range(data.num_draws)]
    sets = [rows.candidates_RC for rows in draws if rows.candidates_RC is not None]
    target_R, target_R1 = draws[0].target_R, draws[0].target_R[:, None]
    past_RH = data.catalogue.keys(draws[0].history_RH)
    broken = ambiguous = seen = 0
    for set_RC in sets:
        broken += int(((set_RC == target_R1).sum(axis=1) != 1).sum())
        key_RC = np.sort(np.where(set_RC >= 0, keys_I[set_RC], -1 - np.arange(set_RC.shape[1])))
        ambiguous += int((np.diff(key_RC, axis=1) == 0).any(axis=1).sum())
        negative_RC = np.where((set_RC < 0) | (set_RC == target_R1), NO_ITEM - 1, keys_I[set_RC])
        seen += int((negative_RC[:, :, None] == past_RH[:, None]).any(axis=(1, 2)).sum())
    evidence = (
        f"{broken} sets without exactly one target, {ambiguous} with two equal titles,"
        f" {seen} with a negative of the history (n = {len(target_R) * len(sets):,})"
    )
    yield Finding(name, "leak" if broken or ambiguous or seen else "ok", evidence)
    if data.config["candidates"] != "full" and len(target_R):
        places = np.concatenate([(set_RC == target_R1).argmax(axis=1) for set_RC in sets])
        p = float(stats.chisquare(np.bincount(places, minlength=sets[0].shape[1])).pvalue)
        evidence = (
            f"the target's place is uniform with p = {p:.2g} (chi-square, n = {len(places):,})"
        )
        yield Finding(f"{split} places", "leak" if p < CHANCE else "ok", evidence)
        if data.config["candidates"] == "recommender":
            popular_RC = data.catalogue.counts_I[sets[0]] > data.catalogue.counts_I[target_R1]
            evidence = (
                "a recommender's first titles: no score on them compares with one on drawn sets;"
                f" {popular_RC[sets[0] != target_R1].mean():.0%} are more popular than the target"
            )
            yield Finding(f"{split} negatives", "warning", evidence)
        else:
            yield _shared_negatives(sets, draws[0], data.catalogue, f"{split} negatives")
    same = [float((a == b).all(axis=1).mean()) for a, b in itertools.combinations(sets, 2)]
    if same:
        verdict: Verdict = "leak" if max(same) > TIED else "ok"
        yield Finding(f"{split} draws", verdict, f"{max(same):.1%} of sets equal in two draws")


def _shared_negatives(sets: Sequence[Ints], rows: Rows, catalogue: Catalogue, name: str) -> Finding:
    """Rows of one target share no more negatives than others, per title that both may draw."""
    target_R, order_R = rows.target_R, rows.target_R.argsort(kind="stable")
    same_2P = np.stack([order_R[:-1], order_R[1:]])
    same_2P = same_2P[:, target_R[same_2P[0]] == target_R[same_2P[1]]]
    same_2P = same_2P[:, :: 1 + same_2P.shape[1] // MAX_PAIRS]
    other_2P = np.random.default_rng(0).integers(len(rows), size=(2, MAX_PAIRS))
    other_2P = other_2P[:, target_R[other_2P[0]] != target_R[other_2P[1]]]
    if not same_2P.size or not other_2P.size:
        return Finding(name, "ok", f"no two of {len(rows):,} rows share a target, or all do")
    (same_P, open_P), (other_P, other_open_P) = (
        _num_shared(sets, rows, catalogue, pairs_2P) for pairs_2P in (same_2P, other_2P)
    )
    rate_P, chance_P = same_P / open_P, other_P / other_open_P
    error = chance_P.std() * np.sqrt(1 / len(rate_P) + 1 / len(chance_P)) + 1e-9
    z = float((rate_P.mean() - chance_P.mean()) / error)
    chance = float(chance_P.mean() * open_P.mean())
    excess = float(same_P.mean() - chance) / (sets[0].shape[1] - 1)
    evidence = (
        f"rows of one target share {same_P.mean():.2f} negatives ({len(same_P):,} pairs),"
        f" by chance {chance:.2f}: z = {z:.1f}"
    )
    return Finding(name, "leak" if z > SHARED_Z and excess > SHARED else "ok", evidence)


def _num_shared(
    sets: Sequence[Ints], rows: Rows, catalogue: Catalogue, pairs_2P: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each draw and pair of rows: negatives in both sets, and titles that both may draw."""

    def num_distinct(values_RX: Ints) -> NDArray[np.int64]:
        sorted_PX = np.sort(np.hstack([values_RX[rows_P] for rows_P in pairs_2P]), axis=1)
        return np.asarray(1 + (np.diff(sorted_PX, axis=1) != 0).sum(axis=1))

    target_R1, row_R1 = rows.target_R[:, None], np.arange(len(rows), dtype=np.int32)[:, None]
    seen_RH = np.where(rows.history_RH >= 0, rows.history_RH, target_R1)
    barred_P = num_distinct(catalogue.title_keys_I[np.hstack([target_R1, seen_RH])])
    drawn = [np.where(set_RC == target_R1, ~row_R1, set_RC) for set_RC in sets]
    shared = [2 * drawn_RC.shape[1] - num_distinct(drawn_RC) for drawn_RC in drawn]
    open_P = (len(catalogue.representatives) - barred_P).clip(1)
    return np.concatenate(shared), np.tile(open_P, len(sets))


def own_history(splits: dict[Split, Rows], data: PreparedData) -> Finding:
    """How often the target, or another item of its title, stands in its own history."""
    catalogue, held = data.catalogue, [splits[split] for split in HELD_OUT]
    target_R1 = np.concatenate([rows.target_R for rows in held])[:, None]
    history_RH = np.concatenate([rows.history_RH for rows in held])
    item_R = (history_RH == target_R1).any(axis=1)
    title_R = (catalogue.keys(history_RH) == catalogue.keys(target_R1)).any(axis=1) & ~item_R
    evidence = (
        f"{item_R.mean():.1%} of held-out targets are in their history,"
        f" {title_R.mean():.1%} by another item of the same title (n = {len(item_R):,})"
    )
    return Finding("own history", "warning" if (item_R | title_R).any() else "ok", evidence)


def order_artefact(events: Events) -> Finding:
    """Tell whether pairs of items stand in one order for all users: then order is not of time.

    LLaRA's LastFM rows follow one global order, which a rule that learns nothing exploits. (So
    does a synthetic world without noise, whose users all walk one cycle.)
    """
    starts = np.flatnonzero(np.diff(events.user_E, prepend=-1))
    ends = np.append(starts[1:], len(events.user_E))
    starts = np.maximum(starts, ends - MAX_EVENTS)
    every = 1 + int(((ends - starts) ** 2 // 2).sum()) // MAX_ORDERED  # users, to bound memory
    keys, forward_parts = [], []
    for start, end in zip(starts[::every], ends[::every], strict=True):
        items = pd.unique(events.item_E[start:end]).astype(np.int64)
        first, second = (items[places] for places in np.triu_indices(len(items), 1))
        keys.append((np.minimum(first, second) << 32) | np.maximum(first, second))
        forward_parts.append(first < second)
    key_P, forward_P = np.concatenate(keys), np.concatenate(forward_parts)
    _, pair_P, seen = np.unique(key_P, return_inverse=True, return_counts=True)
    forward = np.bincount(pair_P, forward_P)
    often = seen >= MIN_SEEN
    if not often.any():
        return Finding("order artefact", "ok", f"no pair of items is shared by {MIN_SEEN} users")
    fixed = ((forward == 0) | (forward == seen))[often]
    chance = float((2.0 ** (1 - seen[often])).mean())
    evidence = (
        f"{fixed.mean():.2f} of the item pairs stand in one order for all users"
        f" ({fixed.sum():,} of {len(fixed):,}; chance {chance:.2f})"
    )
    return Finding("order artefact", "leak" if fixed.mean() > FIXED_ORDER else "ok", evidence)


def time_ties(events: Events) -> Finding:
    """How often a seeded hash had to order what happened at the same time."""
    same_user = np.diff(events.user_E) == 0
    share = float((np.diff(events.time_E)[same_user] == 0).mean()) if same_user.any() else 0.0
    evidence = f"{share:.1%} of a user's neighbouring events have the same time"
    return Finding("time ties", "warning" if share > TIED else "ok", evidence)


def duplicate_titles(data: PreparedData) -> Finding:
    """Items that a title does not tell apart."""
    counts = np.bincount(data.catalogue.title_keys_I)
    items = int(counts[counts > 1].sum())
    evidence = f"{items:,} of {len(data.titles):,} items share their title with another one"
    return Finding("duplicate titles", "warning" if items else "ok", evidence)


def ancestry(path: Path, data: PreparedData) -> Iterator[Finding]:
    """Nothing that a run was made from trained on the run's held-out rows."""
    held_out = pd.concat([_interactions(data, split) for split in HELD_OUT])
    for folder, facts in dict([*_ancestors(path), *_ancestors(data.path)]).items():
        name = f"{facts['kind']} {folder.name[:8]}"
        if not folder.exists():
            yield Finding(name, "warning", "not in this store: what it trained on is unknown")
            continue
        try:
            manifest(folder, verify=True)
        except CheckpointError as error:
            yield Finding(name, "leak", str(error))
        mixed = {key for key, _ in facts["inputs"].get("mixture", [])}
        same = {data.path.name, data.facts["inputs"].get("data")}  # also before it had candidates
        foreign = {facts["inputs"]["data"], *mixed} - same
        folders = [data.path.parent / key for key in sorted(foreign)]
        others = [PreparedData.open(folder) for folder in folders if folder.exists()]
        leaked = sum(len(held_out.merge(_interactions(other, "train"))) for other in others)
        gone = foreign - {other.path.name for other in others}
        evidence = f"trained on {len(foreign)} other data sets, which hold {leaked} held-out rows"
        evidence += f"; {', '.join(sorted(gone))} cannot be read" if gone else ""
        expected = foreign <= mixed and not gone
        verdict: Verdict = "leak" if leaked else "ok" if expected else "warning"
        yield Finding(name, verdict, evidence)


def _interactions(data: PreparedData, split: Split) -> pd.DataFrame:
    """Return the targets of a split by what the raw data calls them."""
    rows = data.rows(split)
    users, items = np.array(data.user_ids()), np.array(data.source_ids)
    columns = {"user": users[rows.user_R], "item": items[rows.target_R], "time": rows.time_R}
    return pd.DataFrame(columns).drop_duplicates()


def _ancestors(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """An artifact and all the trained ones that it was made from, with what their makers noted."""
    facts = manifest(path)
    if facts["kind"] not in ("evaluation", "data"):
        yield path, facts
    for role in ("recommender", "start", "artifact"):
        key = facts["inputs"].get(role)
        if key and isinstance(key, str):
            folders = sorted(path.parents[1].glob(f"*/{key}"))
            yield from itertools.chain.from_iterable(map(_ancestors, folders))
            if not folders:
                yield path.parent / key, {"kind": role}
