"""Finished cells of a grid as files: aggregates and what made them, never a user's row.

DATA/ENTRY-KEY.json          an entry on a data set, over its seeds; the key is of its settings
DATA/FIRST--SECOND-KEY.json  a paired comparison of two of them

Grids share what has the same key, whatever each of them calls it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsllm.assets.catalogue import ASSETS
from rsllm.config import Experiment
from rsllm.config.data import plain_of_known
from rsllm.config.plain import content_hash, to_dict
from rsllm.evaluate.scorers import catalogue_scorer
from rsllm.store.artifacts import Store, read_json, write_json

Cell = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of the paper's table: what is trained, and how it is judged."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Paths into `Experiment`."""
    kind: str = "tuned"
    """tuned or zero-shot, of a language model; else a `CatalogueScorer`'s name."""
    judged: Mapping[str, Any] = field(default_factory=dict)
    """What holds in evaluation alone: paths, such as projector.shuffle_items, and fields of
    `Method`: shuffle_titles, mean_of_orders."""
    fused: bool = False
    """Joined with the recommender of its slots, by a weight chosen on validation."""

    @property
    def is_language_model(self) -> bool:
        """Whether it is a language model."""
        return self.kind in ("tuned", "zero-shot")

    @property
    def trained_by(self) -> str:
        """The stage that trains it, whose seed counts; nothing of what is not trained."""
        if self.is_language_model:
            return "stage2" if self.kind == "tuned" else ""
        return catalogue_scorer(self.kind).trained_by

    def key(self, experiment: Experiment, seeds: Sequence[int]) -> str:
        """A hash of all that decides its numbers beside the data themselves."""
        parts = to_dict(experiment)
        mixed = zip(experiment.mixture, parts["mixture"], strict=True)
        for holder, config in ((parts, experiment.data), *((p, m.data) for m, p in mixed)):
            if config.source in ASSETS:
                holder["data"] = plain_of_known(config)
        decides: Sequence[str] = catalogue_scorer(self.kind).decided_by
        if self.kind == "tuned":
            decides = [name for name in parts if name != "compute"]
        elif self.kind == "zero-shot":
            decides = ["data", "backbone", "prompt", "evaluation"]
        elif parts["recommender"]["items"] == "title":
            decides = [*decides, "backbone", "prompt"]
        seeded = list(seeds) if self.trained_by else []
        own = [self.kind, dict(self.judged), self.fused, seeded]
        if self.is_language_model and experiment.compute.precision != "auto":
            own.append(experiment.compute.precision)
        return content_hash([*own, {name: parts[name] for name in decides}])


@contextmanager
def results_folder(store: Store, name: str, opened: str = "") -> Iterator[Path]:
    """Yield a study's folder; then share it, and print where it is, or which file to open."""
    folder = store.root / "studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    store.share(f"studies/{name}")
    print(f"results: {folder / opened}", flush=True)


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "unnamed"


@dataclass(frozen=True, slots=True)
class Cells:
    """A folder of finished cells and comparisons."""

    root: Path

    def read(self, data: str, key: str) -> Cell | None:
        """What is on file, under whatever name, if anything.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._path(data, key)
        return read_json(path) if path.exists() else None

    def write(self, data: str, key: str, name: str, value: Mapping[str, Any]) -> None:
        """Put it on file, under the name that it has there; a crash leaves the old or the new."""
        path = self._path(data, key, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)

    def comparison(self, data: str, first: Cell, second: Cell) -> Cell | None:
        """The comparison of two cells, unless other predictions were compared."""
        found = self.read(data, content_hash([first["key"], second["key"]]))
        return found if found and found["of"] == _predictions(first, second) else None

    def write_comparison(self, data: str, first: Cell, second: Cell, tests: Cell) -> None:
        """Put a comparison of two cells on file."""
        names = {"first": first["entry"], "second": second["entry"]}
        value = {**tests, **names, "of": _predictions(first, second)}
        key = content_hash([first["key"], second["key"]])
        self.write(data, key, "--".join(map(slug, names.values())), value)

    def _path(self, data: str, key: str, name: str = "") -> Path:
        folder = self.root / slug(data)
        return next(folder.glob(f"*-{key}.json"), folder / f"{name}-{key}.json")


def _predictions(first: Cell, second: Cell) -> list[Any]:
    """What a comparison of two cells stands on."""
    return [first["predictions"], second["predictions"]]
