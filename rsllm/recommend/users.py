"""Lists for every user of a data set, or for histories from a file, over Ray Data.

Users are dealt out in parts of a fixed size. Each part is ranked by one actor and written at once,
so a run that was killed goes on, and what is written does not depend on how many actors there are.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rsllm.compute.layout import Resources
from rsllm.config import Precision
from rsllm.config.plain import content_hash
from rsllm.data.sequences import Ints
from rsllm.errors import DataError, require
from rsllm.recommend.items import Items, UnknownItem
from rsllm.recommend.load import open_ranker
from rsllm.recommend.ranker import ANY_UNSEEN, Filter, Ranker
from rsllm.store.artifacts import MANIFEST, Store
from rsllm.store.remote import Remote
from rsllm.terminal import Progress

KIND = "recommendations"
USERS_A_PART = 256
THREADS = 2
"""Of an actor on CPUs, however many actors there are, so that all of them compute alike."""
DIGITS = 6
"""Of scores in files: fewer than those in which the order of additions shows."""
COLUMNS = ["user_id", "rank", "item_id", "title", "score"]
COLUMNS += ["recommender_score", "recommender_rank", "source", "model"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Lists that are asked for: all that decides them."""

    model: str
    """The artifact's name."""
    data: str
    """The key of its data."""
    by: str
    """What ranks."""
    weight: float
    """Of the recommender in `fused`."""
    k: int
    precision: Precision = "auto"
    allowed: Filter = ANY_UNSEEN
    histories: Mapping[str, Ints] | None = None
    """By user; by default those of all users of the data."""

    @classmethod
    def of(cls, ranker: Ranker, k: int, **how: Any) -> Task:
        """A task for a ranker that is open already."""
        data = ranker.data.path.name
        return cls(model=ranker.name, data=data, by=ranker.by, weight=ranker.weight, k=k, **how)

    @property
    def plain(self) -> dict[str, Any]:
        """The same as JSON can hold it, long things by their hash."""
        only, histories = self.allowed.only, self.histories
        named = histories and [[user, past.tolist()] for user, past in histories.items()]
        return {
            "model": self.model,
            "data": self.data,
            "ranker": self.by,
            "weight": self.weight if self.by == "fused" else None,
            "k": self.k,
            "precision": self.precision,
            "include_seen": self.allowed.include_seen,
            "only": None if only is None else content_hash(only.tolist()),
            "never": content_hash(self.allowed.never.tolist()),
            "histories": None if named is None else content_hash(named),
        }

    def parts(self, ranker: Ranker) -> list[dict[str, Ints]]:
        """The histories of the users of each part."""
        pasts = ranker.pasts() if self.histories is None else self.histories
        starts = range(0, len(pasts), USERS_A_PART)
        return [dict([*pasts.items()][at : at + USERS_A_PART]) for at in starts]

    def table(self, ranker: Ranker, pasts: Mapping[str, Ints]) -> pd.DataFrame:
        """The lists of some users, in `COLUMNS`."""
        found = ranker.lists([*pasts.values()], self.k, self.allowed)
        pairs = zip(pasts, found, strict=True)
        frames = [ranker.table(ranked).assign(user_id=user) for user, ranked in pairs]
        whole = pd.concat(frames, ignore_index=True).assign(model=self.model)
        for name in ("score", "recommender_score"):
            whole[name] = whole[name].round(DIGITS)
        return whole[COLUMNS]


def make_lists(task: Task, ranker: Ranker, store: Store, workers: int = 0) -> Path:
    """The artifact with the lists of all users, `part-*.parquet` in `COLUMNS`; made once.

    Args:
        task: what is asked for.
        ranker: what it was made for.
        store: the store that has the model.
        workers: actors that rank side by side; by default as many as the cluster has room for.
    """
    final = store.path(KIND, task.plain)
    running = store.root / "running" / f"{KIND}-{final.name}"
    parts = task.parts(ranker)

    def commit() -> None:
        running.mkdir(parents=True, exist_ok=True)
        files = [running / f"part-{number:05}.parquet" for number in range(len(parts))]
        waiting = [number for number, file in enumerate(files) if not file.exists()]
        left, total = sum(len(parts[n]) for n in waiting), sum(map(len, parts))
        done = total - left
        with Progress(total=total, initial=done, desc="recommend", unit=" users") as shown:
            asked = [parts[number] for number in waiting]
            for place, content in _ranked(task, ranker, asked, store.location, workers):
                half = files[waiting[place]].with_suffix(".half")
                half.write_bytes(content)
                half.replace(files[waiting[place]])
                shown.update(len(asked[place]))
        with store.commit(KIND, task.plain) as folder:
            for file in files:
                shutil.copy(file, folder / file.name)
        store.remove(f"running/{running.name}")

    return store.ensure(final, commit)


def _ranked(
    task: Task, ranker: Ranker, parts: Sequence[Mapping[str, Ints]], storage: str, workers: int
) -> Iterator[tuple[int, bytes]]:
    """The place and the Parquet bytes of each part, as they get done."""
    import torch

    if len(parts) < 2:  # Ray takes longer to start
        before = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        yield from ((place, parquet(task.table(ranker, part))) for place, part in enumerate(parts))
        torch.set_num_threads(before)
        return
    import ray.data

    from rsllm.compute.start import cluster_resources, quiet_ray_data, start_ray

    start_ray()
    quiet_ray_data()
    found = cluster_resources()
    asked = [
        {"place": place, "users": [*part], "pasts": [past.tolist() for past in part.values()]}
        for place, part in enumerate(parts)
    ]
    rows = ray.data.from_items(asked, override_num_blocks=len(parts)).map_batches(
        _Actor,
        fn_constructor_args=(replace(task, histories=None), ranker.exported or task.model, storage),
        compute=ray.data.ActorPoolStrategy(size=min(workers or room(found), len(parts))),
        batch_size=1,
        num_gpus=1 if found.gpus >= 1 else 0,
        num_cpus=min(1.0, found.cpus / 2),  # Ray Data needs a share of its own
    )
    for row in rows.iter_rows():
        yield row["place"], row["content"]


class _Actor:
    """Has a model open, and ranks one part after another."""

    def __init__(self, task: Task, model: str, storage: str) -> None:
        import torch

        torch.set_num_threads(THREADS)
        opened, _ = open_ranker(model, storage, task.precision)
        self.ranker, self.task = replace(opened, by=task.by, weight=task.weight), task

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pasts = [np.array(past, np.int32) for past in batch["pasts"][0]]
        part = dict(zip(batch["users"][0], pasts, strict=True))
        content = parquet(self.task.table(self.ranker, part))
        return {"place": batch["place"], "content": [content]}


def room(there: Resources) -> int:
    """How many models rank side by side."""
    return int(there.gpus) or max(1, int(there.cpus) // THREADS)


def parquet(table: pd.DataFrame) -> bytes:
    """The bytes of a part's file."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()


def write_out(lists: Path, out: str) -> None:
    """Copy lists to where a user wants them: one file (.parquet, .csv), a folder, or a URI.

    Raises:
        ConfigError: something else is there already.
    """
    own = (lists / MANIFEST).read_bytes()
    if "://" in out:
        parent, _, name = out.rstrip("/").rpartition("/")
        files = [path.name for path in sorted(lists.iterdir())]
        Remote(parent).upload(lists, files, name)
        return
    path = Path(out).expanduser()
    is_file = path.suffix in (".parquet", ".csv")
    facts = path.with_name(f"{path.name}.manifest.json") if is_file else path / MANIFEST
    if path.exists():
        same = facts.exists() and facts.read_bytes() == own
        require(same, f"{out} is there already, and holds something else; choose another --out")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_file:
        shutil.copytree(lists, path)
        return
    table = read_lists(lists)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False, compression="zstd")
    facts.write_bytes(own)


def read_lists(folder: Path) -> pd.DataFrame:
    """All lists of an artifact, in the order of its users."""
    return pd.concat(map(pd.read_parquet, sorted(folder.glob("part-*.parquet"))), ignore_index=True)


def read_histories(path: Path, items: Items, *, skip: bool = False) -> dict[str, Ints]:
    """Histories of a CSV or Parquet file with `user_id`, `item_id` or `title`, perhaps `timestamp`.

    Without times each user's rows stand oldest first.

    Args:
        path: the file.
        items: which item a name means.
        skip: whether to leave out, and count, items that the data do not have.

    Raises:
        DataError: it cannot be read, has no such columns or an empty field.
        UnknownItem: an item that the data do not have, with its line.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:  # "NA" and "null" are titles too
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    name = next((column for column in ("item_id", "title") if column in table), None)
    if "user_id" not in table or name is None:
        raise DataError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; histories need user_id,"
            " and item_id or title"
        )
    names = table[["user_id", name]]
    empty_R = (names.isna() | (names == "")).any(axis=1).to_numpy()
    if empty_R.any():
        raise DataError(f"{path}, row {empty_R.argmax() + 1}: user_id or {name} is empty")
    order_R = np.arange(len(table))
    if "timestamp" in table:
        time_R = pd.to_numeric(table["timestamp"], errors="coerce").to_numpy()
        if (strange_R := np.isnan(time_R)).any():
            row = int(strange_R.argmax())
            value = table["timestamp"].iloc[row]
            raise DataError(f"{path}, row {row + 1}: timestamp {value!r} is no number")
        order_R = time_R.argsort(kind="stable")
    users, texts = table["user_id"].tolist(), table[name].tolist()
    found: dict[str, list[int]] = {}
    skipped = 0
    for row in order_R.tolist():
        user, text = users[row], texts[row]
        own = found.setdefault(str(user), [])
        try:
            own.append(items.find(text))
        except UnknownItem as error:
            if not skip:
                raise UnknownItem(f"{path}, row {row + 1}: {error}") from None
            skipped += 1
    if skipped:
        print(f"{path}: {skipped} rows name items that the data do not have, and are left out")
    return {user: np.array(own, np.int32) for user, own in found.items() if own}


def read_names(path: Path, items: Items) -> Ints:
    """Items of a text file, a title or an id a line.

    Raises:
        DataError: it cannot be read.
        UnknownItem: an item that the data do not have.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return items.find_all(line.strip() for line in lines if line.strip())
