"""What leaves the store: it recommends alone, plain libraries read it, and no user travels."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from model.small_models import save_qwen2
from recommend.small_store import DATA, data_of, language_model, recommender
from safetensors.torch import load_file
from small_data import TITLES

import rsllm
from rsllm.cli import build_parser, main
from rsllm.config import Experiment
from rsllm.config.plain import replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError, ConfigError
from rsllm.export import export
from rsllm.flags import overrides
from rsllm.model.backbone import load_backbone, load_tokenizer
from rsllm.recommend.ranker import Ranker
from rsllm.recommend.users import Task, _Actor
from rsllm.store.artifacts import Store, manifest, seal

HISTORY = [TITLES[0], TITLES[5], TITLES[9]]
HISTORIES = {"stage2.prompts": "history"}
TEXT = {"stage1.representation": "text", "stage": "stage1"}
ONE_LAYER = {"backbone.layers": 1}
FULL = {"backbone.tuning": "full"}
COMMIT = "c0ffee"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def backbone_of_the_hub(tmp_path: Path, random_llm: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that the hub's cache knows."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(random_llm, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    return "org/tiny"


def opened(model: str | Path, **settings: Any) -> Ranker:
    return rsllm.load(model, precision="fp32", **settings)


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def snippets(card: Path) -> list[str]:
    """The Python of a card, which is run as it stands there."""
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def run_snippet(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def assert_equal_lists(found: pd.DataFrame, expected: pd.DataFrame, tolerance: float) -> None:
    texts = ["rank", "title", "item_id", "source"]
    pd.testing.assert_frame_equal(found[texts], expected[texts])
    for column in ("score", "recommender_score"):
        np.testing.assert_allclose(found[column], expected[column], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize(
    "settings",
    [{**HISTORIES, **ONE_LAYER, "folds": True}, {}, TEXT],
    ids=["catalogue", "likelihood", "text"],
)
def test_an_exported_folder_recommends_alone(
    settings: dict[str, Any], form: Any, store: Store, random_llm: Path, tmp_path: Path
) -> None:
    artifact = language_model(store, str(random_llm), **settings)
    before = opened(artifact)
    candidates = TITLES[10:15]
    expected = [before.rank(HISTORY, candidates), before.similar(HISTORY[0])]
    rankings = {by: opened(artifact, ranker=by).rank(HISTORY, candidates) for by in before.rankers}
    assert export(artifact, tmp_path / "out", form) == str(tmp_path / "out")
    shutil.rmtree(store.root)
    after = opened(tmp_path / "out")
    assert (after.name, after.by, after.weight, after.why) == (
        *(f"{artifact.parent.name}/{artifact.name}", before.by),
        *(before.weight, before.why),
    )
    tolerance = 1e-5 if form == "peft" else 1e-3
    assert_equal_lists(after.rank(HISTORY, candidates), expected[0], tolerance)
    pd.testing.assert_frame_equal(after.similar(HISTORY[0]), expected[1])
    for by, ranking in rankings.items():
        again = opened(tmp_path / "out", ranker=by)
        assert (again.by, again.why) == (by, "as asked")
        assert_equal_lists(again.rank(HISTORY, candidates), ranking, tolerance)


def test_lists_lie_beside_an_exported_model(store: Store, random_llm: Path, tmp_path: Path) -> None:
    """In the store of whoever makes them; what others may be given stays as it was exported."""
    artifact = language_model(store, str(random_llm), **HISTORIES)
    out, mine, lists = (tmp_path / name for name in ("out", "mine", "lists.parquet"))
    export(artifact, out, "peft", ranker="catalogue")
    shutil.rmtree(store.root)
    before, asked = files_of(out), tmp_path / "histories.csv"
    pd.DataFrame({"user_id": "me", "title": HISTORY}).to_csv(asked, index=False)
    command = ["recommend", str(out), "--histories", str(asked), "--precision", "fp32"]
    assert main([*command, "--k", "3", "--out", str(lists), "--storage", str(mine)]) == 0
    assert files_of(out) == before
    found = pd.read_parquet(lists)
    ranker = opened(out)
    expected = ranker.recommend(HISTORY, k=3)
    assert found["title"].tolist() == expected["title"].tolist()
    assert set(found["model"]) == {f"stage-2/{artifact.name}"}
    task = Task.of(ranker, 3, precision="fp32")
    pasts = {"me": ranker.items.find_all(HISTORY)}
    actor = _Actor(task, ranker.exported, str(mine))
    (content,) = actor({"place": 0, "users": [["me"]], "pasts": [[pasts["me"]]]})["content"]
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(content)), task.table(ranker, pasts))


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_nothing_of_a_user_travels(
    form: Any, store: Store, random_llm: Path, tmp_path: Path
) -> None:
    artifact = language_model(store, str(random_llm), **HISTORIES)
    out = tmp_path / "out"
    export(artifact, out, form, ranker="catalogue")
    peft = {"adapter_config.json", "adapter_model.safetensors"}
    merged = {"config.json", "generation_config.json", "model.safetensors"}
    key = recommender(store).name
    common = {"README.md", "manifest.json"}
    common |= {f"{name}.safetensors" for name in ("projector", "items", "catalogue")}
    common |= {f"data/{DATA}/{name}" for name in ("items.parquet", "counts.json", "manifest.json")}
    common |= {f"recommender/{key}/{name}" for name in ("recommender.safetensors", "manifest.json")}
    found = files_of(out)
    assert found - common == (peft if form == "peft" else merged) | {
        name for name in found if name.startswith("tokenizer") and form == "merged"
    }
    assert set(manifest(out, verify=True)["files"]) == found - {"manifest.json"}
    assert "count" in pq.read_schema(out / "data" / DATA / "items.parquet").names
    assert json.loads((out / "data" / DATA / "counts.json").read_text()) == {"domain": "movie"}
    model = opened(out)
    with pytest.raises(ConfigError, match="users stay where it was trained"):
        model.recommend(users=["u0"])
    for read in (model.data.events, lambda: model.data.rows("train")):
        with pytest.raises(ConfigError, match="users stay where it was trained"):
            read()


def test_no_path_of_the_machine_travels_with_the_data(
    store: Store, random_llm: Path, tmp_path: Path
) -> None:
    artifact = language_model(store, str(random_llm), **HISTORIES)
    folder = store.root / "data" / DATA
    facts = manifest(folder)
    facts["inputs"]["config"]["source"] = "s3://me:secret@host/private/plays"
    seal_again(folder, facts)
    export(artifact, tmp_path / "out", "peft", ranker="recommender")
    carried = tmp_path / "out" / "data" / DATA
    assert PreparedData.open(carried).config["source"] == "plays"
    assert "secret" not in (carried / "manifest.json").read_text()


def seal_again(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "manifest.json").unlink()
    seal(folder, facts)


@pytest.mark.parametrize(
    "name", [f"data/{DATA}/items.parquet", "adapter_model.safetensors", "projector.safetensors"]
)
def test_an_altered_file_is_refused(
    name: str, store: Store, random_llm: Path, tmp_path: Path
) -> None:
    export(language_model(store, str(random_llm)), tmp_path / "out", "peft", ranker="recommender")
    content = bytearray((tmp_path / "out" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} was altered"):
        opened(tmp_path / "out")


@torch.no_grad()
def test_the_snippets_of_a_card_run(
    store: Store, random_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = language_model(store, str(random_llm), **HISTORIES, **ONE_LAYER)
    ids = torch.tensor([load_tokenizer(random_llm)("Heat (1996)")["input_ids"]])
    expected = opened(artifact).language.model[0].model.llm(ids).logits
    for form, tolerance in (("peft", 0.0), ("merged", 1e-4)):
        export(artifact, tmp_path / form, form, ranker="recommender")
        rank, alone = snippets(tmp_path / form / "README.md")
        capsys.readouterr()
        assert run_snippet(rank)["model"].by == "recommender"
        assert len(capsys.readouterr().out.splitlines()) == 6, "a header and five items"
        plain = run_snippet(alone)["model"]
        torch.testing.assert_close(plain(ids).logits, expected, atol=tolerance, rtol=tolerance)
    whole = load_backbone(random_llm, torch.float32)(ids).logits
    assert (whole - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1])
def test_transformers_reads_a_merged_text_model(
    layers: int, store: Store, random_llm: Path, tmp_path: Path
) -> None:
    """On a backbone whose config names every layer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    backbone = save_qwen2(tmp_path / "qwen2", random_llm)
    artifact = language_model(store, str(backbone), **TEXT, **{"backbone.layers": layers})
    objective, encoder = opened(artifact).language.model
    export(artifact, tmp_path / "out", "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert len(plain.model.layers) == (layers or 2)
    ids = torch.tensor([encoder.prompt([1, 2], [3, 4, 5], 0).tokens.ids])
    expected = objective.model.llm(ids).logits
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)
    text = "The Last Voyage (1996)"
    read = AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]
    assert read == encoder.tokenizer(text)["input_ids"]
    adapter = load_file(artifact / "adapter_model.safetensors")
    place = "model.layers.0.self_attn.q_proj"
    down, up = (adapter[f"base_model.model.{place}.lora_{part}.weight"] for part in "AB")
    settings = json.loads((artifact / "adapter_config.json").read_text())
    gain = settings["lora_alpha"] / settings["r"]
    start = load_file(backbone / "model.safetensors")[f"{place}.weight"]
    by_hand = start.double() + gain * up.double() @ down.double()
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{place}.weight"]
    torch.testing.assert_close(merged.double(), by_hand, atol=1e-6, rtol=1e-6)


def test_a_merge_that_goes_wrong_leaves_nothing(
    store: Store, random_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    artifact = language_model(store, str(random_llm), **HISTORIES)
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(CheckpointError, match=r"scores 6 rows otherwise.*--as peft"):
        export(artifact, tmp_path / "out", "merged", ranker="catalogue")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_whole_tuned_model_is_merged_already(
    store: Store, random_llm: Path, tmp_path: Path
) -> None:
    artifact = language_model(store, str(random_llm), **TEXT, **FULL)
    with pytest.raises(ConfigError, match=r"has no adapter.*--as merged"):
        export(artifact, tmp_path / "out", "peft")
    export(artifact, tmp_path / "out", "merged")
    copied, own = (folder / "model.safetensors" for folder in (tmp_path / "out", artifact))
    assert copied.read_bytes() == own.read_bytes()
    expected = opened(artifact).rank(HISTORY, TITLES[10:15])
    assert_equal_lists(opened(tmp_path / "out").rank(HISTORY, TITLES[10:15]), expected, 1e-5)


def test_what_cannot_be_exported_says_why(
    store: Store,
    random_llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = language_model(store, str(random_llm), **TEXT)
    out, alone = tmp_path / "out", recommender(store)
    storage = ["--storage", str(store.root)]
    for name in (f"recommender/{alone.name}", f"data/{DATA}"):
        assert main(["export", name, "--to", str(out), "--as", "merged", *storage]) == 2
        assert f"{name} cannot be exported: only a language model" in capsys.readouterr().err
    assert main(["export", "stage-1", "--to", str(out), "--as", "peft", *storage]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    for model, to, message in (
        (artifact, out, "out is there already"),
        (out, tmp_path / "again", "was exported already"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(model, to, "peft")
    for to, message in (("no name", "no name on the hub"), ("org/name", "folder of this machine")):
        with pytest.raises(ConfigError, match=message):
            export(artifact, to, "hub")


class Hub:
    """Stands in for the hub's client: it notes what it is asked, and keeps what is pushed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls, self.private = folder, [], None
        for name in ("create_repo", "model_info", "upload_folder"):
            getattr(HfApi, name)  # a method of that name there is
            monkeypatch.setattr(HfApi, name, getattr(self, name))
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        self.private = private if self.private is None else self.private

    def model_info(self, repo_id: str) -> Any:
        files = [SimpleNamespace(rfilename=name) for name in files_of(self.folder)]
        return SimpleNamespace(private=self.private, siblings=files)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: str
    ) -> Any:
        self.calls.append(("upload_folder", repo_id, delete_patterns))
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(folder_path, self.folder)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: Any, ignore_patterns: Any
    ) -> str:
        """Of one model, as the hub's cache keeps it: links to files that bear no names."""
        cached = self.folder.parent / "hub" / f"models--{repo_id.replace('/', '--')}"
        if repo_id != "org/name":
            return str(cached / "snapshots" / "abc")
        snapshot = cached / "snapshots" / COMMIT
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for number, name in enumerate(filter_repo_objects(files_of(self.folder), **patterns)):
            blob, link = cached / "blobs" / str(number), snapshot / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, backbone_of_the_hub: str, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))
    return Hub(tmp_path / "pushed", monkeypatch)


def test_a_model_goes_to_the_hub_and_comes_back(
    hub: Hub, store: Store, backbone_of_the_hub: str, tmp_path: Path
) -> None:
    artifact = language_model(store, backbone_of_the_hub, **HISTORIES)
    expected = opened(artifact).recommend(HISTORY)
    address = export(artifact, "org/name", "hub")
    assert address == f"https://huggingface.co/org/name/commit/{COMMIT}"
    assert hub.calls == [
        ("create_repo", "org/name", True, True),
        ("upload_folder", "org/name", "*"),
    ]
    export(artifact, tmp_path / "local", "peft")
    assert files_of(hub.folder) == files_of(tmp_path / "local")
    card = ModelCard.load(hub.folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/tiny",
        "library_name": "peft",
        "license": "other",
        "license_name": "of-backbone-and-data",
        "tags": ["rsllm", "sequential-recommendation", "lora"],
    }
    rank, alone = snippets(hub.folder / "README.md")
    assert 'rsllm.load("org/name")' in rank
    assert 'PeftModel.from_pretrained(backbone, "org/name")' in alone
    assert 'AutoModelForCausalLM.from_pretrained("org/tiny")' in alone

    (hub.folder / "modeling.py").write_text("raise SystemExit")
    (hub.folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    shutil.rmtree(store.root)
    after = run_snippet(rank)["model"]
    assert after.name == f"org/name@{COMMIT}"
    assert_equal_lists(opened("org/name").recommend(HISTORY), expected, 1e-5)
    (folder,) = (tmp_path / "cache" / "hub" / "models--org--name" / "snapshots").iterdir()
    assert files_of(folder) == files_of(tmp_path / "local")


@pytest.mark.parametrize("public", [True, False])
def test_who_may_see_it_is_as_asked(
    public: bool, hub: Hub, store: Store, backbone_of_the_hub: str
) -> None:
    artifact, how = language_model(store, backbone_of_the_hub, **TEXT), {"public": public}
    export(artifact, "org/name", "hub", **how)
    assert hub.private is not public
    export(artifact, "org/name", "hub", **how)
    hub.private = public
    with pytest.raises(ConfigError, match=f"already and {'private' if public else 'public'}"):
        export(artifact, "org/name", "hub", **how)
    hub.private = not public
    (hub.folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="holds something else"):
        export(artifact, "org/name", "hub", **how)
    assert [call[0] for call in hub.calls].count("upload_folder") == 2


def test_titles_that_may_not_be_passed_on_stay(
    hub: Hub, store: Store, backbone_of_the_hub: str, tmp_path: Path
) -> None:
    folder = data_of(store).path
    facts = manifest(folder)
    facts["inputs"]["config"] |= {"source": "movielens-100k"}
    found_config = facts["inputs"]["config"]
    seal_again(folder, facts)
    artifact = language_model(store, backbone_of_the_hub, **HISTORIES)
    with pytest.raises(ConfigError, match=r"movielens-100k stay here \(research only.*--without"):
        export(artifact, "org/name", "hub")
    assert hub.calls == []
    expected = opened(artifact).recommend(HISTORY)
    assert (
        main(["export", str(artifact), *["--to", "org/name", "--as", "hub", "--without-titles"]])
        == 0
    )
    assert not [name for name in files_of(hub.folder) if name.startswith("data")]
    text = b"".join((hub.folder / name).read_bytes() for name in files_of(hub.folder))
    assert [title for title in TITLES if title.encode() in text] == []
    card = (hub.folder / "README.md").read_text()
    (command,) = re.findall(r"^    rsllm (prepare .*)$", card, re.MULTILINE)
    again = replace_in(Experiment(), overrides(build_parser().parse_args(command.split())))
    assert to_dict(again.data) == found_config, "the same data"
    with pytest.raises(ConfigError, match=f"data/{DATA} is not in .* nor in .*as its card says"):
        opened("org/name", storage=tmp_path / "empty")
    found = opened("org/name", storage=store.root)
    assert_equal_lists(found.recommend(HISTORY), expected, 1e-5)
    assert len(found.recommend(users=["u0"], k=3)) == 3, "the store has its users"


def test_prompts_that_are_worded_otherwise_are_refused(
    store: Store, random_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(language_model(store, str(random_llm), **HISTORIES), tmp_path / "out", "peft")
    monkeypatch.setattr("rsllm.prompts.templates.TEXTS", {"another": "wording"})
    with pytest.raises(ConfigError, match="this rsllm words otherwise"):
        opened(tmp_path / "out", ranker="catalogue").recommend(HISTORY)


def test_a_foreign_model_of_the_hub_is_no_ranker(hub: Hub, random_llm: Path) -> None:
    shutil.copytree(random_llm, hub.folder)
    with pytest.raises(CheckpointError):
        opened("org/name")
    seal(hub.folder, {"kind": "stage-2", "inputs": {}})
    shutil.rmtree(hub.folder.parent / "hub" / "models--org--name")
    shutil.rmtree(hub.folder.parent / "cache")
    with pytest.raises(CheckpointError, match="no model that rsllm export made"):
        opened("org/name")
    shutil.rmtree(hub.folder.parent / "cache")
    seal_again(hub.folder, {"kind": "stage-2", "inputs": {}, "exported": {"by": ["x"]}})
    shutil.rmtree(hub.folder.parent / "hub" / "models--org--name")
    with pytest.raises(ConfigError):
        opened("org/name")
