"""Files that run code in whoever unpickles them, and files that are broken in other ways."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Payload:
    """Unpickling it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


def pickled(canary: Path) -> bytes:
    """What `pickle.load` and the like would run."""
    return pickle.dumps(Payload(canary))


def torch_pickled(canary: Path) -> bytes:
    """The same in PyTorch's own format, a zip."""
    file = io.BytesIO()
    torch.save({"weight": Payload(canary)}, file)
    return file.getvalue()


def contents(canary: Path, whole: bytes) -> dict[str, bytes]:
    """What a stranger may put in the place of a whole file."""
    return {
        "pickle": pickled(canary),
        "torch pickle": torch_pickled(canary),
        "empty": b"",
        "truncated": whole[: len(whole) * 2 // 3],
        "nothing but a header": whole[:9],
        "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
        "endless nesting": b"[" * 200_000,
        "not UTF-8": b"\xff\xfe\x00\x01" * 64,
    }


KINDS = tuple(contents(Path("canary"), b"whole file"))


def code_for(canary: Path) -> str:
    """A module that creates the canary when it is imported."""
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil: pass\n"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
