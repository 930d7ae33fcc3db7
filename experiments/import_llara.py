"""LLaRA's processed files (arXiv 2312.02445) become plain tables in the cache of data sets.

    python experiments/import_llara.py llara-lastfm FOLDER

FOLDER holds one domain of https://huggingface.co/datasets/joyliao7777/LLaRA. Afterwards
`rsllm prepare --data llara-lastfm --set data.split=given` reads the tables as any others.

The files are pickles, which can run code, so only bytes of a known SHA-256 (`import_llara.toml`)
get to the reader, and it can build frames of arrays only. A frame's columns are `seq` (ten item
ids, padded on the right; MovieLens has pairs of id and rating), `len_seq` and `next`. A training
user's sequence is put together again from its prefixes; each sequence becomes a user of its own,
with places in it for times. Cost: seconds.
"""

import argparse
import io
import itertools
import pickle
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rsllm import fetch
from rsllm.assets.download import KnownFile, OwnFolder, scratch
from rsllm.cli import run_script
from rsllm.data.hashing import hash_strings
from rsllm.data.titles import clean_title
from rsllm.errors import DataError

Sequence = list[int]
WINDOW = 10
PADDING = {"movielens": 1682, "lastfm": 4606, "steam": 3581}
"""The id that stands for no item, by domain."""
FILES: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


class LlaraFolder(OwnFolder):
    """A folder with one domain of LLaRA's, which `folder` names."""

    def fill(self, folder: Path) -> None:
        with scratch(folder) as known:
            super().fill(known)
            convert(known, self.folder, folder)


def import_folder(name: str, origin: Path) -> Path:
    """Bring LLaRA's files, which lie in the folder `origin`, into the cache as tables, once.

    Raises:
        DataError: a file that is not there, or has other content than the known one.
    """
    domain, files = FILES[name]["domain"], tuple(KnownFile(*file) for file in FILES[name]["files"])
    return fetch(name, sources=[LlaraFolder(domain, files, str(origin))])


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


def main() -> None:
    """Import one data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=FILES)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    print(import_folder(arguments.name, arguments.folder))


if __name__ == "__main__":
    run_script(main)
