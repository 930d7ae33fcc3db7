"""LLaRA's processed files (arXiv 2312.02445) to plain tables: the one place that reads a pickle.

They are pandas frames of rows: `seq` (ten item ids, padded on the right; MovieLens has pairs of id
and rating), `len_seq` and `next`. Only bytes of a known SHA-256 get here, and even those can build
nothing but arrays. A training user's sequence is put together again from its prefixes; each
sequence becomes a user of its own, with places in it for times.
"""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rsllm.assets import ASSETS, fetch
from rsllm.data.hashing import hash_strings
from rsllm.data.raw import clean_title
from rsllm.downloads import LlaraFolder, copy_verified
from rsllm.errors import ConfigError, DataError

Sequence = list[int]
WINDOW = 10
PADDING = {"movielens": 1682, "lastfm": 4606, "steam": 3581}
"""The id that stands for no item."""


def import_folder(name: str, origin: Path) -> Path:
    """Bring LLaRA's files into the cache as tables, unless they are there.

    Args:
        name: an asset that is LLaRA's.
        origin: folder that holds the files.

    Raises:
        ConfigError: the asset is not LLaRA's, or the cache cannot be written.
        DataError: a file that is not there, or has other content than the known one.
        CheckpointError: the cached folder is damaged.
    """
    known = {n: s for n, a in ASSETS.items() for s in a.sources if isinstance(s, LlaraFolder)}
    if name not in known:
        raise ConfigError(f"{name} is not imported from a folder; choose one of {', '.join(known)}")
    return fetch(name, sources=[_Local(origin, known[name])])


@dataclass(frozen=True)
class _Local:
    """A folder of the user's that holds LLaRA's files."""

    origin: Path
    known: LlaraFolder

    def __str__(self) -> str:
        return str(self.origin)

    def fill(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as verified:
            for file in self.known.files:
                with (self.origin / file.path).open("rb") as content:
                    copy_verified(content, file, Path(verified))
            convert(Path(verified), self.known.domain, folder)


def convert(raw: Path, domain: str, folder: Path) -> None:
    """Write the sequences and the titles as `rsllm.data.sources.llara` describes them.

    Without the whole training file, half of the validation rows (by a hash) train instead, beside
    the sampled training rows there are.

    Args:
        raw: folder with LLaRA's files and nothing else, their content verified.
        domain: movielens, lastfm or steam.
        folder: where the tables go.

    Raises:
        DataError: a file that holds something else than it should.
    """
    padding = PADDING[domain]
    validation, test = (
        [(f"{split}-{n}", row) for n, row in enumerate(rows(raw / f"{file}_data.df", padding))]
        for split, file in (("validation", "Val"), ("test", "Test"))
    )
    if (raw / "train_data.df").exists():
        users = enumerate(together(rows(raw / "train_data.df", padding)))
        train = [(f"train-{n}", user) for n, user in users]
    else:
        sample = raw / "train_data.df1000"
        sampled = rows(sample, padding) if sample.exists() else ()
        trains = hash_strings([user for user, _ in validation], 0) % np.uint64(2) == 0
        train = [(f"sampled-{n}", row) for n, row in enumerate(sampled)]
        train += [row for row, here in zip(validation, trains, strict=True) if here]
        validation = [row for row, here in zip(validation, trains, strict=True) if not here]
    lines = [
        (user, str(item), place, split)
        for split, found in (("train", train), ("validation", validation), ("test", test))
        for user, items in found
        for place, item in enumerate(items)
    ]
    names = ("user_id", "item_id", "timestamp", "split")
    columns = dict(zip(names, zip(*lines, strict=True), strict=True))
    pq.write_table(pa.table(columns), folder / f"llara-{domain}.parquet")
    ids, titles = zip(*_titles(raw), strict=True)
    items_table = pa.table({"item_id": ids, "title": titles})
    pq.write_table(items_table, folder / f"llara-{domain}-items.parquet")


def rows(path: Path, padding: int) -> Iterator[Sequence]:
    """Each row's history and next item, oldest first."""
    frame = read_frame(path.read_bytes(), path.name)
    for sequence, following in zip(frame["seq"], frame["next"], strict=True):
        items = [_item(part) for part in sequence]
        yield [item for item in items if item != padding] + [_item(following)]


def _item(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple | list) else value)


def together(prefixes: Iterable[Sequence]) -> Iterator[Sequence]:
    """Whole sequences from their prefixes, which stand one after the other.

    A row goes on with the sequence of the row before if its history is that row's with its next
    item, less the oldest one if it is full.
    """
    user: Sequence = []
    for row in prefixes:
        if user and row[:-1] == user[-WINDOW:]:
            user = [*user, row[-1]]
            continue
        if user:
            yield user
        user = row
    yield user


def _titles(raw: Path) -> Iterator[tuple[str, str]]:
    names = raw / "id2name.txt"
    if names.exists():
        for line in names.read_text("utf-8").splitlines():
            item, _, title = line.partition("::")
            yield item, clean_title(title, item)
        return
    for line in (raw / "u.item").read_text("latin-1").splitlines():
        number, title, *_ = line.split("|")
        yield str(int(number) - 1), clean_title(title, number)


def read_frame(content: bytes, name: str) -> dict[str, Any]:
    """The columns of a pickled pandas frame, without pandas and without running anything.

    Raises:
        DataError: the pickle asks for anything but a frame of arrays.
    """
    try:
        frame = _Frames(io.BytesIO(content)).load()
        blocks, axes = frame.state["_mgr"].arguments[:2]
        names = list(axes[0]["data"])
        columns: dict[str, Any] = {}
        for values, placement in blocks:
            places = range(len(names))[placement] if isinstance(placement, slice) else placement
            columns |= {names[place]: row for place, row in zip(places, values, strict=True)}
    except DataError:
        raise
    except Exception as error:  # whatever a malformed pickle can cause
        raise DataError(f"{name} is no frame of LLaRA's: {error}") from error
    return columns


class _Inert:
    """Stands for a pandas object: keeps what it was made of, and does nothing."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


_KNOWN: dict[str, Any] = {
    "pandas.core.frame.DataFrame": _Inert,
    "pandas.core.internals.managers.BlockManager": _Inert,
    "pandas.core.indexes.base.Index": _Inert,
    "pandas.core.indexes.range.RangeIndex": _Inert,
    "pandas.core.indexes.base._new_Index": lambda kind, state: state,
    "pandas._libs.internals._unpickle_block": lambda values, place, ndim: (values, place),
    "builtins.slice": slice,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    "numpy.core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy.core.numeric._frombuffer": np._core.numeric._frombuffer,  # type: ignore[attr-defined]
}


class _Frames(pickle.Unpickler):
    """Knows the few names of LLaRA's frames and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise DataError(f"the pickle asks for {module}.{name}, which no frame of LLaRA's does")
        return known
