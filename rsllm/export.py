"""Takes a tuned model out of the store, for peft, for transformers, for another machine, the hub.

What is exported is a folder that recommends by itself, and holds nothing of any user:

adapter_config.json, adapter_model.safetensors    as peft reads them; or, merged,
config.json, model.safetensors, tokenizer         as transformers reads them
projector, items, catalogue.safetensors           slots and keys
data/KEY, recommender/KEY, items/KEY              items; what scores them; of which folds it is
README.md, manifest.json                          model card; settings, ranker, hashes
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsllm.assets.catalogue import ASSETS, HUB_NAME, base_of, hub_name
from rsllm.config import DataConfig
from rsllm.config.plain import flat, to_dict
from rsllm.errors import CheckpointError, ConfigError, require
from rsllm.recommend.load import (
    LANGUAGE_MODELS,
    Exported,
    Tuned,
    is_exported,
    load,
    locate,
    recommender_of,
)
from rsllm.store.artifacts import MANIFEST, Store, commit_dir, manifest, seal, write_json

if TYPE_CHECKING:
    from rsllm.data.prepared import PreparedData
    from rsllm.recommend.ranker import Ranker

Form = Literal["peft", "merged", "hub"]
CARD = "README.md"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CHECKED_ROWS = 64
TOLERANCE = 1e-3
"""By how much a score may move when an adapter is merged in fp32, relative or absolute."""


def export(
    model: str | Path,
    to: str | Path,
    form: Form,
    *,
    storage: str | Path = "rsllm-store",
    ranker: str = "auto",
    titles: bool = True,
    public: bool = False,
) -> str:
    """Write a tuned model as a folder that others can load, or push that to the hub.

    Args:
        model: an artifact of a language model, as `rsllm.load` takes it.
        to: the folder, which must not be there yet; for the hub, organisation/name.
        form: `peft` keeps the adapter apart; `merged` puts it into the backbone, and checks that
            scores stay; `hub` pushes the adapter or, if every weight was tuned, the whole model.
        storage: the store that has the model.
        ranker: what it ranks by from then on, as `rsllm.load` takes it.
        titles: whether the items' titles go along. Without them it is loaded beside a store that
            has the same data.
        public: whether everybody may see it on the hub.

    Returns:
        Where it is: the folder, or its address on the hub.

    Raises:
        ConfigError: what cannot be exported, or not so; titles that may not be passed on.
        CheckpointError: the model is damaged, or scores differently when it is merged.
    """
    store, folder = locate(model, storage)
    whole = not base_of(folder)
    _require_exportable(folder, form, whole)
    if form == "hub":
        raw = manifest(store.local(store.root / "data" / manifest(folder)["inputs"]["data"]))
        _require_shareable(str(to), folder, raw["inputs"]["config"]["source"], titles)
    else:
        require(not Path(to).exists(), f"{to} is there already; choose another folder")
    opened = load(model, storage=storage, ranker=ranker, precision="fp32")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model" if form == "hub" else Path(to)
        merge = form == "merged" and not whole
        _write(opened, store, folder, str(to), merge=merge, titles=titles)
        if titles and (source := _source(opened.data)) in ASSETS:
            print(f"with titles of {source}, for you alone: {ASSETS[source].licence}", flush=True)
        return _push(folder, str(to), public) if form == "hub" else str(to)


def _require_exportable(folder: Path, form: Form, whole: bool) -> None:
    kind, name = folder.parent.name, f"{folder.parent.name}/{folder.name}"
    require(not is_exported(folder), f"{folder} was exported already; export the model it is of")
    require(
        kind in LANGUAGE_MODELS,
        f"{name} cannot be exported: only a language model ({' or '.join(LANGUAGE_MODELS)}) can,"
        " which takes its recommender, keys and items along, and never what users did",
    )
    require(
        form != "peft" or not whole,
        f"{name} has no adapter, because every weight was tuned; give --as merged",
    )


def _require_shareable(name: str, folder: Path, source: str, titles: bool) -> None:
    """Others have to be allowed to have it, and able to load it."""
    require(bool(HUB_NAME.fullmatch(name)), f"{name} is no name on the hub, organisation/model")
    if titles and source in ASSETS:  # no licence of these lets anybody pass titles on
        raise ConfigError(
            f"the titles of {source} stay here ({ASSETS[source].licence}); give --without-titles,"
            " and whoever loads the model prepares the same data"
        )
    base = base_of(folder)
    require(
        not base or hub_name(base) != "",
        f"the backbone {base} is a folder of this machine, without which nobody can use the"
        " adapter; give --as merged and push that, or train on a model of the hub",
    )


def _write(
    ranker: Ranker, store: Store, to: Path, place: str, *, merge: bool, titles: bool
) -> None:
    from rsllm.data.prepared import COUNTS, ITEMS
    from rsllm.recommenders import FILE

    tuned, data = ranker.language, ranker.data
    assert isinstance(tuned, Tuned)
    facts = manifest(tuned.folder, verify=True)
    left_behind = {CARD, "training.json", *(ADAPTER if merge else ())}
    files = [name for name in facts.pop("files") if name not in left_behind]
    chosen = Exported(ranker.name, ranker.by, ranker.weight, ranker.why)
    with commit_dir(to, **facts, exported=asdict(chosen)) as staging:
        for name in files:
            shutil.copyfile(tuned.folder / name, staging / name)
        if merge:
            _merge(tuned, staging, data)
        if titles:
            (carried := staging / "data" / data.path.name).mkdir(parents=True)
            write_json(carried / COUNTS, {"domain": data.domain})  # the others quote raw files
            config = data.config | {"source": _source(data)}
            _carry(data.path, staging, [ITEMS], inputs={**data.facts["inputs"], "config": config})
        if alone := recommender_of(facts["inputs"], store):
            _carry(alone, staging, [FILE])
            if alone.name != facts["inputs"]["recommender"]:  # a table made of several
                _carry(store.root / "items" / facts["inputs"]["recommender"], staging, [])
        _write_card(tuned.folder, staging, place, "" if titles else _preparing(data))


def _carry(source: Path, model: Path, names: Sequence[str], **facts: Any) -> None:
    """Take some files of an artifact along, with what its manifest says but for some facts."""
    folder = model / source.parent.name / source.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, folder / name)
    seal(folder, manifest(source, verify=True) | facts)


def _merge(tuned: Tuned, folder: Path, data: PreparedData) -> None:
    """Write the backbone with the adapter in it, and compare the scores of what is written."""
    from rsllm.evaluate.rank import fixed_sample

    rows = fixed_sample(data.rows("validation"), CHECKED_ROWS)
    before = tuned(rows)
    objective, encoder = tuned.model
    objective.model.llm.merge_and_unload(safe_merge=True).save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    after = replace(tuned, folder=folder)(rows)
    moved = float(np.abs(after - before).max())
    if not np.allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE):
        raise CheckpointError(
            f"{tuned.folder} merged scores {len(rows)} rows otherwise, by up to {moved:.2g}; give"
            " --as peft, which changes no weight"
        )
    print(f"merged; scores of {len(rows)} rows moved by at most {moved:.1g}", flush=True)


def _write_card(source: Path, folder: Path, place: str, prepare: str) -> None:
    """The card of a tuned model, with how what was made of it is loaded."""
    from huggingface_hub import ModelCard

    from rsllm.report.card import LOADING, loading, save_card

    card, base = ModelCard.load(source / CARD), base_of(folder)
    card.data.base_model = hub_name(card.data.base_model or "") or None
    card.data.datasets = [name for name in card.data.datasets or () if name in ASSETS] or None
    card.data.library_name = "peft" if base else "transformers"
    layers = manifest(source)["inputs"]["backbone"]["layers"] if base else 0
    how: Any = {"backbone": base, "layers": layers, "prepare": prepare}
    text, _, _ = card.text.partition(LOADING)
    save_card(folder, card.data, text, loading(place, card.data.library_name, **how))


def _source(data: PreparedData) -> str:
    """The data set, without the way to it on this machine."""
    source: str = data.config["source"]
    return source if source in ASSETS else Path(source).name


def _preparing(data: PreparedData) -> str:
    """The command that prepares the same data from the same files."""
    usual, words = dict(flat(to_dict(DataConfig()))), [f"rsllm prepare --data {_source(data)}"]
    for path, value in flat(data.config):
        if path != "source" and not path.startswith("table.") and value != usual.get(path):
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--set data.{path}={text}")
    return " ".join(words)


def _push(folder: Path, name: str, public: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        found = api.model_info(name)
        files = {file.rfilename for file in found.siblings or ()} - {".gitattributes"}
        require(
            bool(found.private) != public,
            f"{name} is there already and {'private' if public else 'public'}; change that on the"
            " hub, or choose another name",
        )
        require(
            not files or MANIFEST in files,
            f"{name} is there already and holds something else; choose another name",
        )
        # What an earlier model left there would be taken for a part of this one.
        done = api.upload_folder(
            repo_id=name, folder_path=folder, delete_patterns="*", commit_message="rsllm export"
        )
    except ConfigError:
        raise
    except Exception as error:  # the client's errors share no base class of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"cannot push to {name} ({reason}); see hf auth whoami, and whether the hub can be"
            " reached"
        ) from error
    return str(done.commit_url)
