"""What cannot be a backbone is refused before anything is made with it, with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import DATA, save_gpt2, vocabulary_size
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsllm.cli import main
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.errors import ConfigError
from rsllm.model import tuned
from rsllm.model.backbone import check_backbone, load_backbone, load_tokenizer
from rsllm.model.one_pass import CHECK_TITLES, _looks_ahead, ranks_in_one_pass
from rsllm.pipeline import Pipeline
from rsllm.prompts.encode import PromptEncoder

Damage = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1044992\n"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "vocab_size": 512}
GEMMA: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": TINY
    | {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64},
    "vision_config": TINY
    | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
}


@pytest.fixture
def folder(random_llm: Path, tmp_path: Path) -> Path:
    """A whole backbone."""
    return Path(shutil.copytree(random_llm, tmp_path / "llm"))


def put(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def rename(name: str, new: str) -> Damage:
    return lambda folder: (folder / name).rename(folder / new)


def config(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def shards(*missing: str, names: Any = SHARDS) -> Damage:
    """The weights in two files with an index, and some of them gone again."""

    def split(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        places = {name: SHARDS[place % 2] for place, name in enumerate(tensors)}
        for shard in SHARDS:
            held = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
            save_file(held, folder / shard, metadata={"format": "pt"})
        listed = places if names is SHARDS else names
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
        for shard in missing:
            (folder / shard).unlink()

    return split


def cut(name: str, size: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def adapter(folder: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_newline(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


CUSTOM = {"AutoConfig": "stranger.Stranger"}
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a pointer for weights": (put(WEIGHTS, POINTER), f"{WEIGHTS} is a Git LFS pointer, not its"),
    "a pointer for a tokenizer": (put("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS"),
    "a pointer for a config": (put("config.json", POINTER), r"config\.json is a Git LFS pointer"),
    "an adapter": (adapter, "it is an adapter; give the backbone it was trained on, org/base, or"),
    "an adapter beside a model": (put("adapter_config.json", "{}"), "it is an adapter; give"),
    "pickled weights": (rename(WEIGHTS, "pytorch_model.bin"), r"\(pytorch_model\.bin\) can run"),
    "GGUF": (rename(WEIGHTS, "q4.gguf"), r"load it with gguf_file='q4\.gguf' and convert it with"),
    "weights under another name": (rename(WEIGHTS, "x.safetensors"), f"called {WEIGHTS}; fetch it"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"called {WEIGHTS}; fetch it again"),
    "a missing shard": (shards(SHARDS[1]), f"{SHARDS[1]} of {INDEX} is missing; fetch it again"),
    "an index of pickles": (shards(names={"a": "x.bin"}), "names 'x.bin', which is no"),
    "an index of elsewhere": (shards(names={"a": "../x.safetensors"}), "names '../x.safetensors'"),
    "an index of numbers": (shards(names={"a": 3}), "names '3', which is no"),
    "an index of a list": (shards(names=[3]), f"{INDEX} names no files; fetch it again"),
    "an index of nothing": (shards(names={}), f"{INDEX} names no files; fetch it again"),
    "weights cut short": (cut(WEIGHTS, -1000), f"{WEIGHTS} is damaged or cut short"),
    "empty weights": (cut(WEIGHTS, 0), f"{WEIGHTS} is damaged or cut short"),
    "no tokenizer": (no_tokenizer, "it has no tokenizer; fetch it again with all its files"),
    "half a tokenizer": (cut("tokenizer.json", -100), "its tokenizer: "),
    "no token for a newline": (no_newline, "no token for a newline, which ends answers; choose"),
    "a larger vocabulary": (config(vocab_size=300), "ids up to 350, and its config 300 tokens"),
    "no config": (rename("config.json", "x.json"), r"it has no config\.json; give a folder"),
    "a config of nothing": (put("config.json", "{}"), r"its config\.json has no model_type"),
    "a config that is a list": (put("config.json", "[]"), r"config\.json is no JSON object"),
    "half a config": (cut("config.json", -5), r"config\.json is no JSON; fetch it again"),
    "code of its own": (
        config(model_type="stranger", auto_map=CUSTOM),
        "stranger is code that comes with the model, which rsllm never runs; choose a kind",
    ),
    "an unknown kind": (config(model_type="stranger"), "does not recognize this architecture"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "attention both ways": (
        put("config.json", json.dumps({"model_type": "bert"} | TINY)),
        "attention is not causal here, so the answer would be seen; choose",
    ),
    "an encoder and a decoder": (put("config.json", '{"model_type": "t5"}'), "with an encoder"),
    "an encoder of images": (put("config.json", '{"model_type": "clip"}'), "use its text model"),
    "64 positions": (
        config(max_position_embeddings=64),
        "the 39 that an answer leaves of the backbone's 64 positions; lower data.num_candidates or",
    ),
    "20 positions": (config(max_position_embeddings=20), "a context of 20 tokens only, and an"),
}
UNUSED = json.dumps({"weight_map": {"model.embed_tokens.weight": "pytorch_model-00001.bin"}})
WHOLE: dict[str, Damage] = {
    "an index that nobody would use": put("pytorch_model.bin.index.json", UNUSED),
    "an index beside whole weights": put(INDEX, UNUSED),
    "shards": shards(),
    "pickles beside safetensors": put("pytorch_model.bin", "never read"),
    "custom code that is not needed": config(auto_map=CUSTOM),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the check of `train` and `doctor`, and by `plan` where what is missing may still come."""
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(ConfigError, match=message) as error:
        check_backbone(folder, Experiment())
    assert len(str(error.value).splitlines()) == 1
    if damage != "no weights":
        assert main(["plan", "--backbone", str(folder)]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"rsllm: error: {error.value}"


@pytest.mark.parametrize("whole", WHOLE)
def test_whole_folders(whole: str, folder: Path, random_llm: Path) -> None:
    WHOLE[whole](folder)
    assert check_backbone(folder, Experiment()).model_type == "llama"
    found = load_backbone(folder, torch.float32).state_dict()
    for name, tensor in load_backbone(random_llm, torch.float32).state_dict().items():
        assert torch.equal(found[name], tensor)


def test_layers_that_it_does_not_have(folder: Path) -> None:
    check_backbone(folder, replace_in(Experiment(), {"backbone.layers": 2}))
    with pytest.raises(ConfigError, match=r"layers is 3, and it has 2; choose fewer, or 0"):
        check_backbone(folder, replace_in(Experiment(), {"backbone.layers": 3}))


def test_train_finds_it_before_anything_is_prepared(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)
    changes = {"data.source": "synthetic", "backbone.source": str(folder)}
    pipeline = Pipeline(replace_in(Experiment(), changes), tmp_path / "store")
    with pytest.raises(ConfigError, match="is a Git LFS pointer"):
        pipeline.train()
    assert not list((tmp_path / "store").rglob("*"))


def test_what_is_planned_need_not_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    assert check_backbone(tmp_path, Experiment(), weights=False).num_hidden_layers == 2
    with pytest.raises(ConfigError, match=f"called {WEIGHTS}; fetch it again"):
        check_backbone(tmp_path, Experiment())


def test_positions_are_those_that_the_prompts_need(random_llm: Path, tmp_path: Path) -> None:
    """Of the shortest titles; another way out than raising prompt.max_tokens, which cannot help."""
    backbone = save_gpt2(tmp_path / "gpt2", random_llm, positions=200)
    few = replace_in(Experiment(), {"data.num_candidates": 5})
    check_backbone(backbone, few)
    with pytest.raises(ConfigError, match=r"the 175 that an answer leaves of the backbone's 200"):
        check_backbone(backbone, replace_in(few, {"data.num_candidates": 60}))
    with pytest.raises(ConfigError, match=r"prompt\.max_tokens = 20; raise it or lower"):
        check_backbone(backbone, replace_in(few, {"prompt.max_tokens": 20}))


def test_a_model_of_text_and_images_is_its_text_model(random_llm: Path, tmp_path: Path) -> None:
    """Planned for, loaded and tuned as what the whole model says where it is shown no image."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    no_tokenizer_yet = tmp_path / "config"
    no_tokenizer_yet.mkdir()
    (no_tokenizer_yet / "config.json").write_text(json.dumps(GEMMA))
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(no_tokenizer_yet)
    whole = AutoModelForImageTextToText.from_config(shape).eval()
    whole.save_pretrained(tmp_path / "gemma")
    for file in random_llm.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gemma")
    assert check_backbone(tmp_path / "gemma", Experiment()).model_type == "gemma3_text"
    llm = load_backbone(tmp_path / "gemma", torch.float32).eval()
    ids = torch.arange(40)[None]
    torch.testing.assert_close(llm(ids).logits, whole(input_ids=ids).logits)
    with pytest.warns(UserWarning, match="one pass"):
        built = tuned.build(
            Experiment(), "text", tmp_path / "gemma", DATA, None, dtype=torch.float32
        )
    names = [name for name, p in built.hybrid.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2
    assert not any("vision" in name for name in names)


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_that_looks_ahead_is_found_out(
    causal: bool, random_llm: Path, tmp_path: Path
) -> None:
    """Also one whose config does not tell: XLNet's attention goes both ways."""
    if causal:
        save_gpt2(tmp_path, random_llm)
    else:
        from transformers import XLNetConfig, XLNetLMHeadModel

        size = vocabulary_size(random_llm)
        shape = XLNetConfig(vocab_size=size, d_model=32, n_layer=2, n_head=2, d_inner=32)
        shape.initializer_range = 0.3
        torch.manual_seed(0)
        XLNetLMHeadModel(shape).save_pretrained(tmp_path)
        for file in random_llm.glob("tokenizer*"):
            shutil.copy(file, tmp_path)
    prompt = Experiment().prompt
    encoder = PromptEncoder(load_tokenizer(tmp_path), CHECK_TITLES, prompt, "text", "item")
    llm = load_backbone(tmp_path, torch.float32)
    if causal:
        assert ranks_in_one_pass(llm, encoder, tmp_path)
        return
    with pytest.raises(ConfigError, match="not causal, so the answer would be seen; choose"):
        ranks_in_one_pass(llm, encoder, tmp_path)


@pytest.mark.parametrize("peeks", [False, True])
def test_what_rounding_does_with_a_length_is_no_look_ahead(peeks: bool) -> None:
    """SmolLM2's logits in bf16 differ by 0.56 where one more token is read, on a CPU with AMX."""

    class Rounded:
        config, dtype = SimpleNamespace(vocab_size=50), torch.bfloat16

        def __call__(self, ids_BT: torch.Tensor) -> Any:
            seen_BT = ids_BT.float().cumsum(1) + 9.0 * ids_BT.shape[1]
            if peeks:
                seen_BT = seen_BT + 999.0 * (ids_BT[:, -1:] % 2)
            return SimpleNamespace(logits=seen_BT[..., None].bfloat16())

    assert _looks_ahead(Rounded(), [3, 1, 4, 1, 5]) is peeks
