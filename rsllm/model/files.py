"""What lies in a backbone's folder: read by names, JSON and headers, no weights and no code.

What cannot be a backbone is refused in one line, with the way out.
"""

import re
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from rsllm.assets.catalogue import backbone_files
from rsllm.errors import CheckpointError, ConfigError
from rsllm.store.artifacts import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}
TOKENIZER = re.compile(r"tokenizer|vocab|tekken|\.(model|spm|tiktoken)$")
POINTER = b"version https://git-lfs"
CAUSAL_UNSAID = ("gpt_neox", "gpt_neox_japanese")
"""Their configs have `is_decoder` and leave it false, though their attention is causal."""


def read_config(folder: Path) -> Any:
    """The config of a folder's text model.

    Raises:
        ConfigError: no config, or one of a model whose answers cannot be learned token by token.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    _refuse_what_is_no_model(folder)
    stated = _json(folder / "config.json")
    kind = stated.get("model_type")
    if not kind:  # transformers would guess it from the folder's name
        raise refusal(folder, "its config.json has no model_type; fetch it again")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    except Exception as error:  # whatever a stranger's config can cause
        if "auto_map" in stated:
            unrun = f"{kind} is code that comes with the model, which rsllm never runs"
            raise refusal(folder, f"{unrun}; choose a kind that transformers has") from error
        raise refusal(folder, first_line(error)) from error
    if found := stated.get("quantization_config"):
        method = found.get("quant_method", "") if isinstance(found, dict) else ""
        raise refusal(folder, f"its weights are quantised ({method}); give the plain ones")
    if config.is_encoder_decoder:
        raise refusal(folder, f"{kind} reads with an encoder; choose a decoder-only model")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        more = "more than text; use its text model" if text is not config else "no causal LM"
        raise refusal(folder, f"{kind} is {more}, or choose another backbone")
    bidirectional = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    undecided = getattr(text, "is_decoder", None) is False and kind not in CAUSAL_UNSAID
    if bidirectional or undecided:
        raise refusal(
            folder,
            f"{kind}'s attention is not causal here, so the answer would be seen; choose a"
            " causal language model",
        )
    return text


def check_weights(folder: Path) -> None:
    """Refuse weights that could run code when loaded, and those that are not all there.

    Raises:
        ConfigError: there are such.
    """
    _refuse_what_is_no_model(folder)
    for name in _weights(folder):
        try:
            with safe_open(folder / name, "np"):
                pass
        except (OSError, SafetensorError) as error:
            reason = f"{name} is damaged or cut short ({first_line(error)}); fetch it again"
            raise refusal(folder, reason) from error


def has_weights(folder: Path) -> bool:
    """Whether there are weights of any kind, whole or not."""
    return any(path.suffix in {".safetensors", *OTHER_WEIGHTS} for path in folder.iterdir())


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there is any file of one."""
    return any(TOKENIZER.search(path.name) for path in backbone_files(Path(folder)))


def refusal(folder: str | Path, reason: str) -> ConfigError:
    """The error for a folder that cannot be the backbone."""
    return ConfigError(f"cannot load backbone {folder}: {reason}")


def first_line(error: Exception) -> str:
    """Of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refuse_what_is_no_model(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
        way = f"give the backbone it was trained on, {base}, or merge it (peft's merge_and_unload)"
        raise refusal(folder, f"it is an adapter; {way}")
    if not (folder / "config.json").is_file():
        raise refusal(folder, "it has no config.json; give a folder in Hugging Face format")
    for path in backbone_files(folder):
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise refusal(
                    folder, f"{path.name} is a Git LFS pointer, not its content; run git lfs pull"
                )


def _weights(folder: Path) -> list[str]:
    """The files that transformers would read: one, or those of the index of shards.

    An index may name any file, and transformers would unpickle one that is no safetensors.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        listed = _json(folder / INDEX).get("weight_map")
        names = sorted({str(n) for n in listed.values()}) if isinstance(listed, dict) else []
        if not names:
            raise refusal(folder, f"{INDEX} names no files; fetch it again")
        for name in names:
            if PurePath(name).name != name or not name.endswith(".safetensors"):
                raise refusal(folder, f"{INDEX} names {name!r}, which is no *.safetensors in it")
            if not (folder / name).is_file():
                raise refusal(folder, f"{name} of {INDEX} is missing; fetch it again")
        return names
    none = "it has no *.safetensors weights"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_WEIGHTS)
    if not others:
        raise refusal(folder, f"{none} called {WEIGHTS}; fetch it again")
    way = "convert it with save_pretrained"
    if others[0].endswith(".gguf"):
        raise refusal(folder, f"{none}; load it with gguf_file={others[0]!r} and {way}")
    raise refusal(folder, f"{none}, and others ({others[0]}) can run code when loaded; {way}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise refusal(path.parent, f"{path.name} is no JSON; fetch it again") from error
    if not isinstance(found, dict):
        raise refusal(path.parent, f"{path.name} is no JSON object; fetch it again")
    return found
