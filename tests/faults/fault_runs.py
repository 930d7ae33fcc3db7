"""A run that meets faults, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jobs
from faults import Faults
from safetensors.torch import load_file

HERE = Path(__file__).parent
STEPS, COMMITS = 18, 3
SETTINGS = {
    "data.source": "synthetic",
    "data.window": 5,
    "data.num_candidates": 8,
    "recommender.max_epochs": 0.1,
    "backbone.lora_dropout": 0.1,
    "stage1.samples": 72,
    "stage1.batch_size": 4,
    "stage2.samples": STEPS * 4,
    "stage2.batch_size": 4,
    "stage2.validations": COMMITS,
    "stage2.loss.gamma": 1.0,
    "evaluation.validation_rows": 4,
    "compute.workers": 2,
    "compute.threads": 1,
    "compute.precision": "fp32",
    "compute.checkpoint_seconds": 1e6,
}


@dataclass
class Run:
    """One run of a verb on a store of its own."""

    store: Path
    backbone: Path
    faults: Faults = field(default_factory=Faults)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    """What puts the command where it is to run."""
    scheme: str = ""
    """Makes a URI of the store's folder, such as objects://."""

    def __post_init__(self) -> None:
        self.faults.folder = str(self.store / "notes")
        Path(self.faults.folder).mkdir(exist_ok=True, parents=True)

    @property
    def command(self) -> list[str]:
        settings = SETTINGS | {"backbone.source": self.backbone} | self.settings
        sets = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
        driver = [sys.executable, str(HERE / "driver.py"), self.faults.json()]
        return [*self.prefix, *driver, "train", "--storage", f"{self.scheme}{self.store}", *sets]

    def finish(self, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        with self.started() as job:
            job.wait(timeout=seconds)
        return subprocess.CompletedProcess(self.command, job.returncode, self.log.read_text(), "")

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """It runs while the block does."""
        with jobs.started(self.command, self.log, **self.environment) as job:
            yield job

    @property
    def log(self) -> Path:
        return self.store / "notes" / "log"

    def weights(self, kind: str = "stage-2") -> str:
        """SHA-256 of what was exported."""
        (folder,) = (p.parent for p in (self.store / kind).glob("*/manifest.json"))
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def weights_differ(self, other: Run) -> float:
        """The largest difference of any tensor of stage 2 from that of another run."""
        own, others = ({t: v for f in run._files() for t, v in f.items()} for run in (self, other))
        assert own.keys() == others.keys()
        return max(float((own[name] - others[name]).abs().max()) for name in own)

    def _files(self) -> list[dict[str, Any]]:
        paths = sorted(self.store.glob("stage-2/*/**/*.safetensors"))
        return [load_file(path) for path in paths]

    def pid(self, rank: int) -> int:
        """Process of a rank's last attempt."""
        return self.notes(rank, "process")[-1][1]

    def notes(self, rank: int, word: str) -> list[tuple[float, int]]:
        """(time, number) of what a rank noted: its steps, or where it went on from."""
        lines = (self.store / "notes" / f"rank-{rank}.log").read_text().splitlines()
        parts = [line.split() for line in lines]
        return [(float(at), int(number)) for at, what, number in parts if what == word]

    def met(self, number: int = 0) -> float:
        """When a fault happened."""
        return float((self.store / "notes" / f"fault-{number}").read_text())

    def steps_again(self, number: int = 0) -> int:
        """How many steps rank 0 took again after a fault, each of which made it start again."""
        restored_at, restored = self.notes(0, "restored")[number + 1]
        before = [step for at, step in self.notes(0, "step") if at < restored_at]
        return before[-1] + 1 - restored

    def record(self, moment: float, number: int = 0, fault: str = "") -> None:
        """Log how long after a moment rank 0 took steps again, and how many of them anew."""
        restored_at, _ = self.notes(0, "restored")[number + 1]
        seconds = next(at for at, _ in self.notes(0, "step") if at > restored_at) - moment
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
        again = self.steps_again(number)
        append_to_log(test=test, fault=fault, seconds=round(seconds, 1), steps_again=again)


def append_to_log(**entry: Any) -> None:
    """Append a line to the file that $RSLLM_FAULT_LOG names, if it names one."""
    if path := os.environ.get("RSLLM_FAULT_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def copy_store(run: Run, store: Path, *missing: str) -> None:
    """A run's store without the artifacts of some stages."""
    shutil.copytree(run.store, store, ignore=shutil.ignore_patterns("notes", "ray", *missing))
