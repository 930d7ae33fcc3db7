"""The work of one task in each pass of the preparation: files in, files and counts out.

What a pass leaves for the next one stands in the job's `scratch` folder. A task that runs again
writes the same files again.
"""

# Axes: E events, U users of a group, I items, R rows.

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

from rsllm.config import DataConfig
from rsllm.data import candidates, interactions, prepared, sequences
from rsllm.data.files import Chunk
from rsllm.data.hashing import UInt64s
from rsllm.data.raw import read_interactions, sum_changes
from rsllm.data.sequences import SPLITS, Bools, Catalogue, Events, Ints, Rows, Split
from rsllm.data.sources import RawData
from rsllm.data.titles import Change
from rsllm.errors import DataError

EVENTS_AT_ONCE = 1 << 18
ROWS_AT_ONCE = 1 << 16
Counts = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One preparation."""

    config: DataConfig
    data: RawData
    folder: Path

    @property
    def scratch(self) -> Path:
        """Removed at the end."""
        return self.folder / ".scratch"


@dataclass(frozen=True)
class Users:
    """All users together, as each group needs to know them."""

    number_U: list[Ints]
    """Each user's number, by group; -1 if a filter dropped the user."""
    split_U: Ints
    """Each user's split, by number, where users have one."""
    cuts: tuple[int, int]
    """The times at which validation and test begin, for splits in time."""


def read(job: Job, item_ids: pa.Array, task: tuple[int, Chunk]) -> Counts:
    """Deal the clean interactions of a chunk out to the groups; list the rejected lines."""
    (number, chunk), config, table = task, job.config, job.data.layout.interactions
    split = {"split": pa.int8()} if "split" in table.columns else {}
    schema = pa.schema({"user": pa.string(), "item": pa.int32(), "time": pa.int64()} | split)
    counts = Counter[str]()
    rejects: list[tuple[int, str, str]] = []
    changes: list[Mapping[str, Change]] = []
    times: list[int] = []
    with ExitStack() as stack:
        files = [_dealt(job, group) / f"{number}.arrow" for group in range(config.num_shards)]
        writers = [stack.enter_context(pa.ipc.new_file(file, schema)) for file in files]
        for clean in read_interactions(chunk, table, item_ids):
            rejects += [(line, *fault) for line, fault in clean.broken.items()]
            changes.append(clean.changes)
            counts.update(lines=clean.num_lines, used=len(clean.table), rejected=len(clean.broken))
            rows = clean.table
            if "rating" in rows.column_names:
                rows = rows.filter(pa.compute.field("rating") >= config.min_rating)
                counts["below_min_rating"] += len(clean.table) - len(rows)
            users = rows["user"].combine_chunks()
            group_E = interactions.group_of(users, config.seed, config.num_shards)
            dealt = rows.select(schema.names).take(group_E.argsort(kind="stable"))
            bounds = np.bincount(group_E, minlength=config.num_shards).cumsum()
            for writer, stop, size in zip(writers, bounds, np.diff(bounds, prepend=0), strict=True):
                writer.write_table(dealt.slice(stop - size, size))
            if len(rows):
                times += pa.compute.min_max(rows["time"]).as_py().values()
    return {
        "lines": 0,
        **counts,
        "rejects": rejects,
        "times": times,
        "changes": sum_changes(changes),
    }


def _dealt(job: Job, group: int) -> Path:
    folder = job.scratch / f"dealt-{group}"
    folder.mkdir(exist_ok=True)
    return folder


def order(job: Job, item_hash_I: UInt64s, group: int) -> Counts:
    """Order a group's events by user and time, and drop its duplicates."""
    files = sorted(_dealt(job, group).glob("*.arrow"))
    parts = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    table = pa.concat_tables(parts)
    item_E, time_E = table["item"].to_numpy(), table["time"].to_numpy()
    ids, hash_U, events, line_E = interactions.in_order(
        table["user"].combine_chunks(), item_E, time_E, item_hash_I, job.config.seed
    )
    split_U = np.zeros(len(ids), np.int8)
    if "split" in table.column_names:
        split_E = table["split"].to_numpy()[line_E]
        split_U[events.user_E] = split_E
        other_E = split_U[events.user_E] != split_E
        if other_E.any():
            user = ids[int(events.user_E[other_E][0])].as_py()
            raise DataError(
                f"user {user!r} is in several splits; data.table.split names one per user"
            )
    kept_E = interactions.distinct(events, job.config.duplicates)
    table = pa.table(vars(events.take(kept_E)))
    feather.write_feather(table, job.scratch / f"events-{group}", compression="lz4")
    facts = {"id": ids, "hash": hash_U, "split": split_U}
    feather.write_feather(pa.table(facts), job.scratch / f"users-{group}")
    return {"duplicates": int((~kept_E).sum())}


def _read_events(job: Job, group: int) -> Events:
    table = feather.read_table(job.scratch / f"events-{group}")
    return Events(*(column.to_numpy() for column in table.columns))


def survey(job: Job, kept_I: Bools, span: tuple[int, int], group: int) -> Counts:
    """Count what remains of a group if only the kept items do."""
    events = _read_events(job, group)
    events = events.take(interactions.core(events, kept_I, job.config.min_user_events))
    num_users = len(feather.read_table(job.scratch / f"users-{group}", columns=["hash"]))
    starts_E = np.diff(events.user_E, prepend=-1) != 0
    first_U = np.full(num_users, -1, np.int64)
    first_U[events.user_E[starts_E]] = events.time_E[starts_E]
    bins_E = interactions.time_bins(events.time_E, *span)
    np.savez(
        job.scratch / f"survey-{group}.npz",
        first_U=first_U,
        items_I=np.bincount(events.item_E, minlength=len(kept_I)),
        bins=np.bincount(bins_E, minlength=interactions.TIME_BINS),
    )
    return {"events": len(events.user_E)}


def write(job: Job, number_I: Ints, users: Users, group: int) -> Counts:
    """Write a group's events and training rows; hand its held-out rows on.

    `number_I` is the final number of each item, or -1.
    """
    events = _read_events(job, group)
    user_E, item_E = users.number_U[group][events.user_E], number_I[events.item_E]
    kept = np.flatnonzero((user_E >= 0) & (item_E >= 0))
    kept = kept[user_E[kept].argsort(kind="stable")]
    numbered = Events(user_E[kept], item_E[kept], events.time_E[kept])
    recent_E = interactions.most_recent(numbered, job.config.max_history)
    events = numbered.take(recent_E)
    match job.config.split:
        case "leave-one-out":
            split_E = sequences.leave_one_out_targets(events)
        case "time":
            split_E = sequences.time_targets(events, *users.cuts)
        case _:
            split_E = sequences.user_targets(events, users.split_U)
    counts = Counter[str](
        beyond_max_history=int((~recent_E).sum()),
        kept=len(events.user_E),
        history_only=int((split_E < 0).sum()),
    )
    name = f"part-{group:05d}.parquet"
    prepared.write_table(job.folder / "events" / name, "events", [*vars(events).values()])
    files = [job.folder / "train" / name]
    files += [job.scratch / f"{split}-{group}" for split in SPLITS[1:]]
    trained_I = np.zeros(int(number_I.max()) + 1, np.int64)
    with ExitStack() as stack:
        writers = [stack.enter_context(prepared.table_writer(file, "rows")) for file in files]
        for part in _user_slices(events.user_E):
            rows = sequences.windows(events.take(part), job.config.window)
            long_R, split_R = rows.length_R >= job.config.min_history, split_E[part]
            for code, split in enumerate(SPLITS):
                chosen = rows.take((split_R == code) & long_R)
                writers[code].write_table(prepared.to_table("rows", prepared.row_columns(chosen)))
                counts[f"{split}.seen"] += int((split_R == code).sum())
                counts[f"{split}.short_history"] += int(((split_R == code) & ~long_R).sum())
                counts["train.kept"] += len(chosen) if split == "train" else 0
            # A user's first items train as histories, if the user has a row at all.
            trained_R = (split_R == 0) & np.isin(rows.user_R, np.unique(rows.user_R[long_R]))
            trained_I += np.bincount(rows.target_R[trained_R], minlength=len(trained_I))
    np.save(job.scratch / f"trained-{group}.npy", trained_I)
    return counts


def _user_slices(user_E: Ints) -> Iterator[slice]:
    """Slices of about `EVENTS_AT_ONCE` events that no user straddles."""
    start = 0
    while start < len(user_E):
        last = min(start + EVENTS_AT_ONCE, len(user_E)) - 1
        stop = int(np.searchsorted(user_E, user_E[last], "right"))
        yield slice(start, stop)
        start = stop


def hold_out(job: Job, catalogue: Catalogue, split: Split) -> Counts:
    """Write a split's rows by user, and its candidate sets."""
    config = job.config
    assert config.candidates != "recommender", "these need what is fitted on the others"
    files = [job.scratch / f"{split}-{group}" for group in range(config.num_shards)]
    table = pa.concat_tables([prepared.read_table(file, "rows") for file in files])
    table = table.take(table["user"].to_numpy().argsort(kind="stable"))
    cold_R = catalogue.counts_I[table["target"].to_numpy()] == 0
    if config.cold_items == "drop":
        table = table.filter(pa.array(~cold_R))
    rows = prepared.to_rows(table, config.window)
    prepared.write_table(job.folder / f"{split}.parquet", "rows", prepared.row_columns(rows))
    how = (catalogue, config.num_candidates, config.candidates)

    def drawn(some: Rows, draw: int) -> Ints:
        keys_R = candidates.row_keys(config.seed, split, some.user_R, some.position_R, draw)
        return candidates.draw_candidates(keys_R, some.history_RH, some.target_R, *how)

    for draw in range(config.num_draws):
        path = prepared.candidates_file(job.folder, split, draw)
        prepared.write_sets(path, rows, partial(drawn, draw=draw), ROWS_AT_ONCE)
    return {f"{split}.cold_target": int(cold_R.sum()), f"{split}.kept": len(rows)}
