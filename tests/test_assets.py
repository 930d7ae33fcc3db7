"""Assets: fetched whole or not at all, from whichever source works, and only once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rsllm.assets import catalogue
from rsllm.assets.catalogue import (
    ASSETS,
    Asset,
    backbone_here,
    cache_root,
    fetch,
    fingerprint,
    resolve_backbone,
)
from rsllm.assets.download import AssetSource, KnownFile, UrlZip, Wheel, _convert_gguf
from rsllm.errors import CheckpointError, ConfigError, DataError
from rsllm.store import artifacts

CONTENT = b"user item rating\n" * 100
TOY = KnownFile("toy/ratings.txt", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `/cut` promises more bytes than it sends, `/stall` never ends."""

    release = threading.Event()

    def do_GET(self) -> None:
        if self.path not in ("/cut", "/stall"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"PK\x03\x04" + b"x" * 1000)
        self.wfile.flush()
        if self.path == "/stall":
            self.release.wait(20)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server over `tmp_path / "site"`, which holds toy.zip."""
    root = tmp_path / "site"
    root.mkdir()
    write_zip(root / "toy.zip", {TOY.path: CONTENT, "toy/other.txt": b"unused"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    Handler.release.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Handler.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_wheel(folder: Path) -> Wheel:
    """A wheel that carries the toy file, which pip accepts."""
    folder.mkdir()
    path = folder / "rsllm_toy-1.0-py3-none-any.whl"
    metadata = b"Metadata-Version: 2.1\nName: rsllm-toy\nVersion: 1.0\n"
    tag = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {
        TOY.path: CONTENT,
        "rsllm_toy-1.0.dist-info/METADATA": metadata,
        "rsllm_toy-1.0.dist-info/WHEEL": tag,
        "rsllm_toy-1.0.dist-info/RECORD": b"",
    }
    write_zip(path, members)
    return Wheel("rsllm-toy==1.0", artifacts.sha256(path), (TOY,))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Registers sources as the asset `toy`, with an empty cache and pip cut off from any index."""
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))

    def register(*sources: AssetSource) -> None:
        monkeypatch.setitem(ASSETS, "toy", Asset("data set", "toy licence", sources))

    return register


def assert_nothing_left(cache: Path) -> None:
    assert list(cache.iterdir()) == []


def test_fetch_verifies_commits_and_names_the_licence(
    site: str, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(UrlZip(f"{site}/toy.zip", (TOY,)))
    folder = fetch("toy")
    assert folder == cache_root() / "toy"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "ratings.txt"]
    facts = artifacts.manifest(folder, verify=True)
    assert facts["files"]["ratings.txt"]["sha256"] == TOY.sha256
    assert facts["source"] == f"{site}/toy.zip"
    progress = capsys.readouterr().err
    assert "toy licence" in progress
    assert "\ndownload: " in progress


def test_second_call_touches_neither_network_nor_files(site: str, toy: Any, tmp_path: Path) -> None:
    toy(UrlZip(f"{site}/toy.zip", (TOY,)))
    folder = fetch("toy")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (tmp_path / "site" / "toy.zip").unlink()
    assert fetch("toy") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_damaged_cache_is_refused(site: str, toy: Any) -> None:
    toy(UrlZip(f"{site}/toy.zip", (TOY,)))
    (fetch("toy") / "ratings.txt").write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointError, match="delete it to rebuild"):
        fetch("toy")


def test_falls_back_to_a_wheel(site: str, toy: Any, tmp_path: Path) -> None:
    toy(UrlZip(f"{site}/gone.zip", (TOY,)), write_wheel(tmp_path / "wheels"))
    folder = fetch("toy")
    assert (folder / "ratings.txt").read_bytes() == CONTENT
    assert "rsllm-toy==1.0" in artifacts.manifest(folder)["source"]


def test_altered_wheel_is_refused(toy: Any, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "wheels")
    toy(Wheel(wheel.requirement, "0" * 64, wheel.files))
    with pytest.raises(DataError, match="unexpected SHA-256"):
        fetch("toy")


def test_failure_lists_every_source_and_reason(
    site: str, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    toy(
        UrlZip(f"{site}/gone.zip", (TOY,)),
        UrlZip("http://127.0.0.1:9/toy.zip", (TOY,)),
        Wheel("rsllm-absent==1.0", "0" * 64, (TOY,)),
    )
    with pytest.raises(DataError) as failure:
        fetch("toy")
    reasons = str(failure.value).splitlines()[1:]
    expected = ["404", "refused", "No matching distribution"]
    assert len(reasons) == len(expected)
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))
    assert_nothing_left(cache_root())


WRONG = {
    "changed": {TOY.path: CONTENT[:-1] + b"?"},
    "longer": {TOY.path: CONTENT + b"\n"},
    "missing": {"toy/other.txt": CONTENT},
    "parent": {TOY.path: CONTENT, "../escape.txt": b"x"},
    "backslash": {TOY.path: CONTENT, "a\\..\\..\\escape.txt": b"x"},
    "absolute": {TOY.path: CONTENT, "/escape.txt": b"x"},
}


@pytest.mark.parametrize("members", WRONG.values(), ids=WRONG.keys())
def test_archive_with_other_content_leaves_nothing(
    members: dict[str, bytes], site: str, toy: Any, tmp_path: Path
) -> None:
    write_zip(tmp_path / "site" / "bad.zip", members)
    toy(UrlZip(f"{site}/bad.zip", (TOY,)))
    with pytest.raises(DataError, match=r"bad\.zip"):
        fetch("toy")
    assert_nothing_left(cache_root())
    assert not list(tmp_path.rglob("escape*"))


def test_corrupt_and_cut_downloads_leave_nothing(site: str, toy: Any, tmp_path: Path) -> None:
    archive = tmp_path / "site" / "toy.zip"
    content = bytearray(archive.read_bytes())
    content[60] ^= 0xFF
    archive.write_bytes(content)
    (tmp_path / "site" / "half.zip").write_bytes(content[: len(content) // 2])
    toy(*(UrlZip(f"{site}/{name}", (TOY,)) for name in ("toy.zip", "half.zip", "cut")))
    with pytest.raises(DataError) as failure:
        fetch("toy")
    assert len(str(failure.value).splitlines()) == 4
    assert_nothing_left(cache_root())


def test_zip_bomb_is_not_unpacked(site: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "site" / "bomb.zip", {TOY.path: bytes(50_000_000)})
    with pytest.raises(DataError, match="not the known file"):
        UrlZip(f"{site}/bomb.zip", (TOY,)).fill(tmp_path)
    assert (tmp_path / TOY.name).stat().st_size == TOY.bytes + 1


def test_killed_fetch_leaves_no_asset(site: str, toy: Any) -> None:
    script = (
        "from rsllm.assets import catalogue, download\n"
        f"source = download.UrlZip('{site}/stall', (download.{TOY!r},))\n"
        "catalogue.ASSETS['toy'] = catalogue.Asset('data set', 'toy licence', (source,))\n"
        "catalogue.fetch('toy')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert "fetching" in child.stderr.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    toy(UrlZip(f"{site}/toy.zip", (TOY,)))
    assert not (cache_root() / "toy").exists()
    assert (fetch("toy") / "ratings.txt").read_bytes() == CONTENT


def test_concurrent_fetches_agree(site: str, toy: Any) -> None:
    toy(UrlZip(f"{site}/toy.zip", (TOY,)))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch, ["toy"] * 4))
    assert folders == {cache_root() / "toy"}
    artifacts.manifest(cache_root() / "toy", verify=True)
    assert [path.name for path in cache_root().iterdir()] == ["toy"]


def test_unwritable_cache_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="set RSLLM_CACHE"):
        fetch("movielens-100k", cache=tmp_path / "file" / "cache")


def test_unknown_asset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="movielens-100k, smollm2-135m-q4, llara-lastfm"):
        fetch("movielens")


class TestResolveBackbone:
    def test_folder_with_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").touch()
        assert resolve_backbone(str(tmp_path)) == tmp_path

    def test_hub_name_in_the_local_cache(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        assert resolve_backbone("org/name") == snapshot
        assert fingerprint(snapshot) == "org/name@abc"
        (snapshot.parents[1] / "refs" / "main").write_text("def")
        with pytest.raises(ConfigError, match="org/name is not in the local hub cache"):
            resolve_backbone("org/name")
        assert backbone_here(str(snapshot), "org/name") == str(snapshot)
        elsewhere = snapshot.relative_to(tmp_path)
        with pytest.raises(ConfigError, match="org/name is not in the local hub cache"):
            backbone_here(f"/another/node/{elsewhere}", "org/name")

    @pytest.mark.parametrize(("offline", "reason"), [(True, "HF_HUB_OFFLINE"), (False, "404")])
    def test_hub_name_that_cannot_be_had(
        self, offline: bool, reason: str, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", site)
        message = f"org/name is not in the local hub cache.*{reason}.*rsllm fetch"
        with pytest.raises(ConfigError, match=message):
            resolve_backbone("org/name")

    @pytest.mark.parametrize("source", ["", "smollm", "movielens-100k", "/no/such/folder", "../x"])
    def test_anything_else_names_the_known_ones(self, source: str) -> None:
        with pytest.raises(ConfigError, match="smollm2-135m-q4"):
            resolve_backbone(source)

    def test_asset_is_fetched(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(catalogue, "fetch", lambda name: tmp_path / name)
        assert resolve_backbone("smollm2-135m-q4") == tmp_path / "smollm2-135m-q4"


def test_catalogue_knows_the_real_movielens_titles() -> None:
    root = os.environ.get("RSLLM_TEST_ASSETS")
    if root is None:
        pytest.skip("RSLLM_TEST_ASSETS is not set")
    source = ASSETS["movielens-100k"].sources[0]
    assert isinstance(source, UrlZip)
    (titles,) = (file for file in source.files if file.name == "u.item")
    real = Path(root, "data/llara/movielens/u.item")
    assert (real.stat().st_size, artifacts.sha256(real)) == (titles.bytes, titles.sha256)


def write_gguf(path: Path, model: Any, tokens: list[str]) -> None:
    """A llama GGUF in F32, query and key rows interleaved as llama.cpp stores them."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 9", "T o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            rows = heads.get(name.split(".")[-2])
            values = weight.float().numpy()
            if rows:
                halves = values.reshape(rows, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape).copy()
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_gguf_equals_the_model_it_was_made_from(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokens += ["19", "To"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    original = LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
    write_gguf(tmp_path / "tiny.gguf", original, tokens)

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        _convert_gguf(tmp_path / "tiny.gguf", tmp_path / name)
    weights = [
        artifacts.sha256(tmp_path / name / "model.safetensors") for name in ("first", "second")
    ]
    assert weights[0] == weights[1]
    shutil.rmtree(tmp_path / "second")

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "first/config.json").read_text())
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    for name, weight in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            converted(ids).logits, original(ids).logits, atol=1e-4, rtol=1e-4
        )

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    text = "To 1995, don't (199)  caf\u00e9"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokens.index("To") in ids
    assert tokens.index("19") not in ids
    assert tokenizer.bos_token_id not in ids


def test_real_smollm2_answers_offline() -> None:
    folder = cache_root() / "smollm2-135m-q4"
    if not folder.exists():
        pytest.skip("smollm2-135m-q4 is not in the cache")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (fetch("smollm2-135m-q4") / "model.safetensors").stat().st_size == 269_060_552
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    text = "Toy Story (1995)"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("1995")]
    assert digits == ["1", "9", "9", "5"]
