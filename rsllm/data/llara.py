"""LLaRA's processed files (arXiv 2312.02445) to plain tables: the one place that reads a pickle.

They are pandas frames of rows: `seq` (ten item ids, padded on the right; MovieLens has pairs of id
and rating), `len_seq` and `next`. Only bytes of a known SHA-256 get here, and even those can build
frames of arrays only. A training user's sequence is put together again from its prefixes; each
sequence becomes a user of its own, with places in it for times.
"""

import io
import itertools
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rsllm.assets.catalogue import ASSETS, fetch
from rsllm.assets.download import LlaraFolder, copy_known, scratch
from rsllm.data.hashing import hash_strings
from rsllm.data.raw import clean_title
from rsllm.errors import ConfigError, DataError

Sequence = list[int]
WINDOW = 10
PADDING = {"movielens": 1682, "lastfm": 4606, "steam": 3581}
"""The id that stands for no item."""


def import_folder(name: str, origin: Path) -> Path:
    """Bring LLaRA's files, which lie in the folder `origin`, into the cache as tables, once.

    Raises:
        ConfigError: the asset `name` is not LLaRA's, or the cache cannot be written.
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
        with scratch(folder) as known:
            copy_known(self.origin, self.known.files, known)
            convert(known, self.known.domain, folder)


def convert(raw: Path, domain: str, folder: Path) -> None:
    """Write the sequences and titles of verified files as `sources/llara.toml` describes them.

    `raw` holds them and nothing else. Without the whole training file, half of the validation rows
    (by a hash) train instead, beside the sampled training rows there are.

    Raises:
        DataError: a file that holds something else than it should.
    """
    padding = PADDING[domain]
    validation, test = (
        [(f"{split}-{n}", row) for n, row in enumerate(rows(raw / f"{file}_data.df", padding))]
        for split, file in (("validation", "Val"), ("test", "Test"))
    )
    if (raw / "train_data.df").exists():
        users = together(rows(raw / "train_data.df", padding))
        train = [(f"train-{n}", user) for n, user in enumerate(users)]
    else:
        sample = raw / "train_data.df1000"
        sampled = rows(sample, padding) if sample.exists() else ()
        trains = hash_strings([user for user, _ in validation], 0) % np.uint64(2) == 0
        train = [(f"sampled-{n}", row) for n, row in enumerate(sampled)]
        train += itertools.compress(validation, trains)
        validation = list(itertools.compress(validation, ~trains))
    lines = [
        (user, str(item), place, split)
        for split, found in (("train", train), ("validation", validation), ("test", test))
        for user, items in found
        for place, item in enumerate(items)
    ]
    names = ("user_id", "item_id", "timestamp", "split")
    _write(folder / f"llara-{domain}.parquet", names, lines)
    _write(folder / f"llara-{domain}-items.parquet", ("item_id", "title"), _titles(raw))


def _write(path: Path, names: Iterable[str], lines: Iterable[tuple[Any, ...]]) -> None:
    columns = zip(*lines, strict=True)
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)


def rows(path: Path, padding: int) -> Iterator[Sequence]:
    """Each row's history and next item, oldest first."""
    frame = read_frame(path.read_bytes(), path.name)
    for sequence, following in zip(frame["seq"], frame["next"], strict=True):
        yield [item for item in map(_id, sequence) if item != padding] + [_id(following)]


def _id(value: Any) -> int:
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
        else:
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
    else:
        for line in (raw / "u.item").read_text("latin-1").splitlines():
            number, title, *_ = line.split("|")
            yield str(int(number) - 1), clean_title(title, number)


def read_frame(content: bytes, name: str) -> pd.DataFrame:
    """The frame that a pickle holds.

    Raises:
        DataError: the pickle asks for anything but a frame of arrays.
    """
    try:
        frame = _Frames(io.BytesIO(content)).load()
    except DataError:
        raise
    except Exception as error:  # whatever a malformed pickle can cause
        raise DataError(f"{name} is no frame of LLaRA's: {error}") from error
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{name} is no frame of LLaRA's: it holds a {type(frame).__name__}")
    return frame


_KNOWN = {
    "pandas.core.frame.DataFrame",
    "pandas.core.internals.managers.BlockManager",
    "pandas.core.indexes.base.Index",
    "pandas.core.indexes.range.RangeIndex",
    "pandas.core.indexes.base._new_Index",
    "pandas._libs.internals._unpickle_block",
    "builtins.slice",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
}


class _Frames(pickle.Unpickler):
    """Knows the few names of LLaRA's frames and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # as it was called until NumPy 2
        if f"{module}.{name}" not in _KNOWN:
            raise DataError(f"the pickle asks for {module}.{name}, which no frame of LLaRA's does")
        return super().find_class(module, name)
