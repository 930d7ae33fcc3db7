"""A tuned language model as a folder: what was tuned, the projector and the items it projects.

`adapter_config.json` and `adapter_model.safetensors` load with plain peft. A backbone of which
every weight was tuned stands there as plain transformers loads it, with its tokenizer.
`projector.safetensors` holds projector and marker, `items.safetensors` the recommender's item
table, `catalogue.safetensors` the catalogue scorer with the key of every item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsllm.config import BackboneConfig, Experiment, Form, ProjectorConfig, Representation
from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError, ConfigError
from rsllm.model.backbone import context_length, load_backbone, load_tokenizer, tunable
from rsllm.model.catalogue import CatalogueHead, ItemKeys
from rsllm.model.hybrid import HybridLM, ItemSlots
from rsllm.model.one_pass import CHECK_TITLES, ranks_in_one_pass
from rsllm.model.projector import mean_embeddings
from rsllm.prompts.encode import PromptEncoder
from rsllm.recommenders.embeddings import ItemEmbeddings

PROJECTOR = "projector.safetensors"
CATALOGUE = "catalogue.safetensors"
ADAPTER = "adapter_model.safetensors"
ROUNDING = 1e-2
"""Of keys, whose entries are below 1, where they were made in bf16."""
KEYS, TITLES = "keys", "titles"
"""In the catalogue scorer's file, beside its weights."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A hybrid LM with the encoder that writes its prompts."""

    hybrid: HybridLM
    encoder: PromptEncoder
    source: BackboneConfig
    items: ItemEmbeddings | None = None
    """What the slots project; None for text prompts."""
    titles_IF: Tensor | None = None
    """Title vectors, which with the items make the keys of the catalogue scorer."""


def build(
    experiment: Experiment,
    representation: Representation,
    backbone: str | Path,
    data: PreparedData,
    items: ItemEmbeddings | None,
    *,
    dtype: torch.dtype,
    form: Form = "choice",
    titles_IF: Tensor | None = None,
    seed: int = 0,
    lora: bool = True,
) -> LanguageModel:
    """Backbone, fresh LoRA (unless `lora` is off) and, for unified prompts, fresh slots.

    With title vectors it also has a fresh catalogue scorer.

    Raises:
        ConfigError: the backbone cannot be loaded, its context is too short for any prompt, or
            its output head cannot score candidates.
    """
    torch.manual_seed(seed)
    llm = load_backbone(backbone, dtype, experiment.backbone.layers)
    tokenizer = load_tokenizer(backbone)
    prompt, positions = experiment.prompt, context_length(llm.config)
    check = PromptEncoder(tokenizer, CHECK_TITLES, prompt, "text", "item", positions=positions)
    one_pass = ranks_in_one_pass(llm, check, backbone)
    encoder = PromptEncoder(
        tokenizer,
        data.titles,
        prompt,
        representation,
        data.domain,
        form=form,
        positions=positions,
    )
    slots = catalogue = None
    if encoder.slotted:
        if items is None:
            raise ConfigError(f"{representation} prompts need the item table of a recommender")
        slots = _fresh_slots(llm, items, encoder.title_ids, experiment.projector)
    if titles_IF is not None:
        known_XE = items.standardised() if slots and items else None
        keys = ItemKeys(known_XE, titles_IF, data.catalogue, experiment.catalogue)
        catalogue = CatalogueHead(keys, llm.get_input_embeddings().weight.shape[1])
    llm = tunable(llm, experiment.backbone) if lora else llm
    hybrid = HybridLM(llm, slots, catalogue, one_pass=one_pass)
    kept = items if slots else None
    return LanguageModel(hybrid, encoder, experiment.backbone, kept, titles_IF)


def _fresh_slots(
    llm: Any, items: ItemEmbeddings, title_ids: Sequence[Sequence[int]], config: ProjectorConfig
) -> ItemSlots:
    embeddings_VD = llm.get_input_embeddings().weight.detach()
    shown = items.shuffled() if config.shuffle_items else items
    slots = ItemSlots(shown.standardised(), embeddings_VD, config)
    if config.start == "titles":
        titles_ID = mean_embeddings(embeddings_VD, title_ids)
        slots.projector.start_at_titles(slots.items_IE[: len(titles_ID)], titles_ID)
    return slots


def save(model: LanguageModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what was tuned, and the projector, from gathered tensors named as in `HybridLM`."""
    llm: Any = model.hybrid.llm
    weights = _without_prefix(tensors, "llm.")
    if model.source.tuning == "lora":
        llm.peft_config["default"].base_model_name_or_path = model.source.source
        llm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        weights = {name: tensor.to(llm.dtype) for name, tensor in weights.items()}
        llm.save_pretrained(folder, state_dict=weights)
        model.encoder.tokenizer.save_pretrained(folder)
    slots = _without_prefix(tensors, "slots.")
    if model.items is not None:
        save_file(slots, folder / PROJECTOR)
        model.items.save(folder)
    if (head := model.hybrid.catalogue) is not None and model.titles_IF is not None:
        trained = _without_prefix(tensors, "catalogue.")
        save_catalogue(head.keys, trained, model.titles_IF, folder)


def save_catalogue(
    keys: ItemKeys, trained: Mapping[str, Tensor], titles_IF: Tensor, folder: Path
) -> None:
    """Write weights of a catalogue scorer, the keys that they make, and the titles' vectors.

    The weights are whole ones; those of `keys` itself may be parted by ZeRO.
    """
    named = {name.removeprefix("keys."): tensor for name, tensor in trained.items()}
    keys_XK = keys.made_by(named["turn_KK"], named["log_gain_P"])
    keys_IK = keys_XK[: keys.num_items].contiguous()
    save_file({**trained, KEYS: keys_IK, TITLES: titles_IF}, folder / CATALOGUE)


def load_keys(keys: ItemKeys, folder: Path) -> None:
    """Load what the keys alone have learned.

    Raises:
        CheckpointError: the file is missing, damaged, or of other items.
    """
    _load_catalogue(keys, keys, _stored(folder), folder)


def title_vectors(folder: Path) -> Tensor:
    """The title vectors of a tuned model that has a catalogue scorer. [I, F].

    Raises:
        CheckpointError: its file is missing or damaged.
    """
    return _stored(folder)[TITLES]


def stored_keys(folder: Path) -> Tensor:
    """The key of every item of a tuned model that has a catalogue scorer. [I, K].

    Raises:
        CheckpointError: its file is missing or damaged.
    """
    return _stored(folder)[KEYS]


def _stored(folder: Path) -> dict[str, Tensor]:
    path = folder / CATALOGUE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}; train it again") from error
    if lost := {KEYS, TITLES} - set(tensors):
        raise CheckpointError(f"{path} has no {' or '.join(sorted(lost))}; train it again")
    return tensors


def load(model: LanguageModel, folder: Path) -> None:
    """Load what was tuned and, if both have one, the projector into a model of the same kind.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    try:
        if model.source.tuning == "lora":
            _load_adapter(model.hybrid.llm, folder)
        else:
            weights = load_backbone(folder, model.hybrid.llm.dtype).state_dict()
            model.hybrid.llm.load_state_dict(weights)
        if model.hybrid.slots is not None and (folder / PROJECTOR).exists():
            model.hybrid.slots.load_state_dict(load_file(folder / PROJECTOR))
        if (head := model.hybrid.catalogue) and (folder / CATALOGUE).exists():
            stored = _stored(folder)
            # Keys of an earlier stage whose items had no slots are narrower, and stay behind.
            if stored[KEYS].shape[-1:] == (head.keys.width,):
                _load_catalogue(head, head.keys, stored, folder)
    except (OSError, SafetensorError, RuntimeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder} does not fit this model or is damaged: {error}; train it again"
        ) from error


def _load_catalogue(
    module: CatalogueHead | ItemKeys, keys: ItemKeys, tensors: dict[str, Tensor], folder: Path
) -> None:
    """The weights, with which the stored keys must come out again."""
    stored_IK, _ = tensors.pop(KEYS), tensors.pop(TITLES)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / CATALOGUE} does not fit these keys: {error}; train it again"
        ) from error
    with torch.no_grad():
        fresh_IK = keys()[: keys.num_items]
    if fresh_IK.shape != stored_IK.shape or not torch.allclose(fresh_IK, stored_IK, atol=ROUNDING):
        raise CheckpointError(
            f"{folder / CATALOGUE} holds keys of other items than these; prepare the data as it was"
            " trained on"
        )


def _load_adapter(llm: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(llm, load_file(folder / ADAPTER))
    lost, extra = sum("lora_" in name for name in result.missing_keys), len(result.unexpected_keys)
    if lost or extra:
        raise CheckpointError(
            f"{folder} does not fit this backbone: {lost} lost, {extra} unexpected"
        )


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
