"""What does assembling prompts as ids save, against writing a string and tokenising it?

The reference does the obvious per row: an f-string of titles and placeholder tokens, the fast
tokenizer, and for slots a loop that pairs each placeholder found with its item. "Assembling" is
rows to ids and slots. "Collating" makes a training batch of it on both sides: the reference pads
prompt and answer and masks the labels; ours also lays out positions, spans, targets alone and
histories, which the losses read. Both run in turn in one process on the same rows of a prepared
data set; rates are medians over the rounds. Loading the tokenizer and, on our side, tokenising the
catalogue once (reported in seconds) are left out, as is moving to a device.

    python experiments/benchmarks/prompts.py --out results.json

Cost: half a minute on one core, once the data are prepared. Last measured:
experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from tabulate import tabulate

from rsllm import Experiment, Pipeline
from rsllm.cli import run_script
from rsllm.config import Representation
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.rank import decision, held_out
from rsllm.model.backbone import load_tokenizer
from rsllm.prompts.collate import Row, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.store.artifacts import provenance, write_json

ROUNDS, ROWS, BATCH = 9, 96, 8
MARKER, SLOT = "[DSR]", "[IID]"
AFTER_TITLE: dict[Representation, str] = {"text": "", "unified": MARKER + SLOT}


class Strings:
    """The reference: one string per prompt."""

    def __init__(self, tokenizer: Any, titles: Sequence[str], representation: Representation):
        self.tokenizer, self.titles = copy.deepcopy(tokenizer), titles
        self.after = AFTER_TITLE[representation]
        self.tokenizer.add_special_tokens({"additional_special_tokens": [MARKER, SLOT]})
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.slot = self.tokenizer.convert_tokens_to_ids(SLOT)

    def prompt(self, row: Row) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and (position, item) of each slot."""
        past = ", ".join(f"{self.titles[item]}{self.after}" for item in row.history)
        choice = ", ".join(f"{self.titles[item]}{self.after}" for item in row.candidates)
        ids = self.tokenizer(
            f"This user has watched {past}. The next movie this user will watch is one of these"
            f" {len(row.candidates)}: {choice}.\nThe title of the next movie is"
        )["input_ids"]
        if not self.after:
            return ids, []
        places = [place for place, token in enumerate(ids) if token == self.slot]
        return ids, list(zip(places, [*row.history, *row.candidates], strict=True))

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Padded ids, attention mask, labels, and the item at each slot."""
        sequences, prompts = [], [self.prompt(row) for row in rows]
        for row, (ids, _) in zip(rows, prompts, strict=True):
            answer = f" {self.titles[row.target]}\n"
            sequences.append(ids + self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        batch = self.tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        labels_BT = torch.full_like(batch["input_ids"], -100)
        item_BT = torch.full_like(labels_BT, -1)
        for row, ((ids, slots), sequence) in enumerate(zip(prompts, sequences, strict=True)):
            labels_BT[row, len(ids) : len(sequence)] = torch.tensor(sequence[len(ids) :])
            for place, item in slots:
                item_BT[row, place] = item
        return {**batch, "labels": labels_BT, "item": item_BT}


def rates(
    data: PreparedData, tokenizer: Any, rows: Sequence[Row], representation: Representation
) -> list[dict[str, Any]]:
    """Median prompts per second of both at each task, and the median ratio of their rounds."""
    start = time.perf_counter()
    encoder = PromptEncoder(
        tokenizer, data.titles, Experiment().prompt, representation, data.domain
    )
    catalogue = time.perf_counter() - start
    plain, keys = Strings(tokenizer, data.titles, representation), data.catalogue.title_keys_I
    batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    tasks: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "assembling": (
            lambda: [encoder.prompt(row.history, row.candidates, 0) for row in rows],
            lambda: [plain.prompt(row) for row in rows],
        ),
        "collating": (
            lambda: [collate(part, encoder, keys, all_branches=False) for part in batches],
            lambda: [plain.batch(part) for part in batches],
        ),
    }
    found = []
    for name, runs in tasks.items():
        rounds = [[len(rows) / timeit(run, number=1) for run in runs] for _ in range(1 + ROUNDS)][
            1:
        ]
        ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(own / other for own, other in rounds)
        row = {"prompts": representation, "task": name, "rsllm": ours, "strings": theirs}
        found.append({**row, "ratio": ratio, "catalogue_s": catalogue})
    return found


def main() -> None:
    """Measure text and unified prompts; print and write the rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipeline = Pipeline(Experiment(), arguments.storage)
    data = PreparedData.open(pipeline.prepare())
    tokenizer = load_tokenizer(pipeline.backbone)
    held = held_out(data, "validation", ROWS)[0]
    rows = [decision(held, index) for index in range(len(held))]
    torch.set_num_threads(1)
    found = [
        row
        for representation in AFTER_TITLE
        for row in rates(data, tokenizer, rows, representation)
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"rounds": ROUNDS, "rows": len(rows), "tokenizer": Experiment().backbone.source}
    write_json(arguments.out, {"prompts_per_second": found, **facts, "provenance": provenance()})
    print(tabulate(found, headers="keys", floatfmt=("", "", ".0f", ".0f", ".1f", ".2f")))


if __name__ == "__main__":
    run_script(main)
