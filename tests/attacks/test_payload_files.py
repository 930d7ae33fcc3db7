"""Whatever stands in a file that rsllm reads, nothing of it runs and the error is ours."""

from __future__ import annotations

import pickle
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jobs import ROOT
from payloads import KINDS, Payload, contents, pickled, torch_pickled
from safetensors.torch import save_file
from small_data import TITLES, small_data

from rsllm import recommenders
from rsllm.config import Experiment, RecommenderConfig, TableConfig
from rsllm.config.plain import content_hash, replace_in
from rsllm.data import sources
from rsllm.data.prepared import PreparedData
from rsllm.data.tables import read_all
from rsllm.errors import DataError
from rsllm.evaluate.run import SCORES, read_scores
from rsllm.model import tuned
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import MANIFEST, manifest, read_json, seal, sha256, write_json
from rsllm.study.external import export_candidates, read_predictions

CONFIG = RecommenderConfig(model="gru4rec", width=8)
RAW_COLUMNS = ("user", "item", "time", "title")
TUNED = replace_in(Experiment(), {"backbone.lora_rank": 2, "projector.hidden": 8})


def test_the_payloads_do_run(canary: Path) -> None:
    """Without which the other tests would show nothing."""
    pickle.loads(pickled(canary))
    assert canary.exists()
    canary.unlink()
    (canary.parent / "weights.bin").write_bytes(torch_pickled(canary))
    torch.load(canary.parent / "weights.bin", weights_only=False)
    assert canary.exists()


@cache
def model(llm: Path) -> tuned.LanguageModel:
    items = ItemEmbeddings(torch.randn(len(TITLES), 8), "made up")
    data: Any = type("Data", (), {"titles": TITLES, "domain": "movie"})
    return tuned.build(TUNED, "unified", llm, data, items, dtype=torch.float32)


def write_tuned(folder: Path, llm: Path) -> None:
    folder.mkdir()
    weights = {n: p.detach() for n, p in model(llm).hybrid.named_parameters() if p.requires_grad}
    tuned.save(model(llm), weights, folder)


def write_recommender(folder: Path, _: Path) -> None:
    folder.mkdir()
    recommenders.save(recommenders.build(CONFIG, 5, 4), folder)


def write_scores(folder: Path, _: Path) -> None:
    folder.mkdir()
    save_file({"scores": torch.zeros(1, 2, 3)}, folder / SCORES)


def write_data(folder: Path, _: Path) -> None:
    small_data(folder)


def write_predictions(folder: Path, _: Path) -> None:
    sets = export_candidates(small_data(folder), "validation", folder / "scores.parquet")
    pd.read_parquet(sets).assign(score=0.0).to_parquet(sets)


def write_raw(folder: Path, _: Path) -> None:
    folder.mkdir()
    columns = {name: ["1"] for name in RAW_COLUMNS}
    pq.write_table(pa.table(columns), folder / "raw.parquet")


def open_data(folder: Path) -> None:
    """With a manifest that fits, as a stranger would make it."""
    facts = read_json(folder / MANIFEST)
    (folder / MANIFEST).unlink()
    seal(folder, facts)
    data = PreparedData.open(folder)
    for split in ("train", "validation", "test"):
        data.rows(split)  # type: ignore[arg-type]


def read_raw(path: Path) -> list[Any]:
    raw = sources.find(str(path), TableConfig(user="user", item="item", time="time", title="title"))
    return [piece for _, _, piece in read_all(raw.interactions, raw.layout.interactions)]


def predict(folder: Path) -> None:
    read_predictions(folder / "scores.parquet", PreparedData.open(folder), "validation")


@pytest.fixture(scope="module")
def wholes(random_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """A folder of each writer."""
    made = {}
    for write in {loader.write for loader in LOADERS.values()}:
        made[write] = tmp_path_factory.mktemp("wholes") / "artifact"
        write(made[write], random_llm)
    return made


@dataclass(frozen=True)
class Loader:
    """A file of a folder that `write` makes, and what reads it."""

    file: str
    write: Callable[[Path, Path], None]
    read: Callable[[Path, Path], object]


LOADERS = {
    "adapter": Loader(tuned.ADAPTER, write_tuned, lambda f, llm: tuned.load(model(llm), f)),
    "projector": Loader(tuned.PROJECTOR, write_tuned, lambda f, llm: tuned.load(model(llm), f)),
    "items": Loader("items.safetensors", write_tuned, lambda f, _: ItemEmbeddings.load(f)),
    "recommender": Loader(
        recommenders.FILE, write_recommender, lambda f, _: recommenders.load(f, CONFIG, 5, 4)
    ),
    "scores": Loader(SCORES, write_scores, lambda f, _: read_scores(f)),
    "item table": Loader("items.parquet", write_data, lambda f, _: open_data(f)),
    "shard": Loader("train/part-00001.parquet", write_data, lambda f, _: open_data(f)),
    "candidates": Loader("candidates/test-0.parquet", write_data, lambda f, _: open_data(f)),
    "counts": Loader("counts.json", write_data, lambda f, _: open_data(f)),
    "manifest": Loader(MANIFEST, write_data, lambda f, _: manifest(f)),
    "predictions": Loader("scores.parquet", write_predictions, lambda f, _: predict(f)),
    "raw data": Loader("raw.parquet", write_raw, lambda f, _: read_raw(f / "raw.parquet")),
}
TENSORS = ("adapter", "projector", "items", "recommender", "scores")


@pytest.fixture
def artifact(name: str, wholes: dict[Any, Path], tmp_path: Path) -> Path:
    """A whole folder of the loader that the test is about."""
    return shutil.copytree(wholes[LOADERS[name].write], tmp_path / "artifact")


@pytest.mark.parametrize("name", LOADERS)
def test_whole_files_are_read(name: str, random_llm: Path, artifact: Path) -> None:
    """Or the refusals below would have another reason."""
    LOADERS[name].read(artifact, random_llm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOADERS)
def test_nothing_runs(
    name: str, kind: str, random_llm: Path, canary: Path, refused: Any, artifact: Path
) -> None:
    path = artifact / LOADERS[name].file
    path.write_bytes(contents(canary, path.read_bytes())[kind])
    with refused():
        LOADERS[name].read(artifact, random_llm)


@pytest.mark.parametrize("name", TENSORS)
def test_bytes_behind_the_tensors_are_refused(
    name: str, random_llm: Path, canary: Path, refused: Any, artifact: Path
) -> None:
    with (artifact / LOADERS[name].file).open("ab") as file:
        file.write(pickled(canary))
    with refused():
        LOADERS[name].read(artifact, random_llm)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "link"])
def test_a_manifest_names_no_file_elsewhere(name: str, tmp_path: Path, refused: Any) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "elsewhere").write_text("x")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    facts = {"bytes": 1, "sha256": sha256(tmp_path / "elsewhere")}
    write_manifest(folder, {"files": {name: facts}})
    with refused("is damaged: .* is not in it"):
        manifest(folder)


@pytest.mark.parametrize("listed", [{}, {"files": 3}, {"files": {"a": None}}, {"files": {"a": {}}}])
def test_a_manifest_of_another_shape(listed: Any, tmp_path: Path, refused: Any) -> None:
    write_manifest(tmp_path, listed)
    with refused("lists no files"):
        manifest(tmp_path)


def write_manifest(folder: Path, facts: Any) -> None:
    write_json(folder / MANIFEST, {**facts, "digest": content_hash(facts)})


def test_a_line_of_code_in_raw_data_is_no_row(canary: Path, tmp_path: Path) -> None:
    """Some dumps write their objects as Python literals, which are parsed and never evaluated."""
    call = f"{{'user': __import__('os').system('touch {canary}'), 'item': '1'}}"
    row = "{'user': 'u', 'item': 'i', 'time': 1, 'title': 'Heat'}"
    path = tmp_path / "raw.json"
    path.write_text(f"{row}\n{call}\n{'[' * 200_000}\n")
    (piece,) = read_raw(path)
    assert piece.columns.num_rows == 1
    assert {line: reason for line, (reason, _) in piece.broken.items()} == {
        1: "no JSON object",
        2: "no JSON object",
    }
    assert not canary.exists()


def test_an_arrow_type_that_is_a_pickle_is_plain_data(canary: Path, tmp_path: Path) -> None:
    """Arrow before 14.0.1 unpickled it when it opened the file (CVE-2023-47248)."""
    names = {"name": "arrow.py_extension_type", "metadata": pickled(canary)}
    facts = {f"ARROW:extension:{key}": value for key, value in names.items()}
    fields = [pa.field(name, pa.string(), metadata=facts) for name in RAW_COLUMNS]
    table = pa.Table.from_arrays([pa.array(["1"])] * 4, schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "raw.parquet")
    assert pickled(canary) in pq.read_schema(tmp_path / "raw.parquet").field(0).metadata.values()
    (piece,) = read_raw(tmp_path / "raw.parquet")
    assert piece.columns.to_pylist() == [dict.fromkeys(RAW_COLUMNS, "1")]
    assert not canary.exists()


DOTTED = b"\x80\x04\x8c\x11pandas.core.frame\x8c\x0eDataFrame.eval\x93."
"""Asks for a method of a class that is allowed."""


def test_a_frame_of_llaras_with_a_forbidden_global(
    canary: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the reader itself, and on the way that a user's folder takes."""
    script = runpy.run_path(str(ROOT / "experiments" / "import_llara.py"))
    frame = pickle.dumps(pd.DataFrame({"seq": [Payload(canary)]}))
    for content in (pickled(canary), frame, DOTTED):
        with refused(r"the pickle asks for [\w.]+, which no frame of LLaRA's does"):
            script["read_frame"](content, "x.df")
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for file in ("train_data.df", "Val_data.df", "Test_data.df", "id2name.txt"):
        (tmp_path / file).write_bytes(frame)
    with pytest.raises(DataError, match="is not the known file"):
        script["import_folder"]("llara-lastfm", tmp_path)
    assert not canary.exists()
    assert list((tmp_path / "cache").iterdir()) == []
