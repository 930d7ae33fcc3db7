"""What does a language model know of titles that their letters do not say? Trains keys on both.

The keys of the catalogue scorer know titles by the letters they are written with. This adds, as a
further part of every key, the mean state that the untuned language model has over a title after
some of its layers, whitened to as many numbers as the letters have. Each kind of key is trained for
one epoch, and judged on the same validation users. Letters of twice the width are the control: a
gain of theirs would be one of wider keys, and not of the language model's.

    python experiments/probe_titles.py --data toys --set recommender.folds=4 --out probe.json

Cost: 45 min on 2 cores that other work shared, beside the recommenders. Expected: above letters.
Last measured: wider letters gain as much, see experiments/results/probe_titles/.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from rsllm.cli import run_script
from rsllm.compute.start import start_ray
from rsllm.config import Experiment
from rsllm.config.plain import replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.evaluate import rank
from rsllm.evaluate.statistics import mean_interval, paired
from rsllm.flags import add_setting_flags, add_storage_flag, overrides
from rsllm.model.backbone import load_backbone, load_tokenizer
from rsllm.model.hybrid import pool
from rsllm.pipeline import Pipeline
from rsllm.prompts.collate import items_alone
from rsllm.prompts.encode import PromptEncoder
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.recommenders.ngrams import title_vectors
from rsllm.store.artifacts import provenance, write_json
from rsllm.study import paper
from rsllm.train.keys import KeysTask

SHARED = {"data.split": "leave-one-out", "data.num_draws": 8, "catalogue.max_epochs": 1.0}
LETTERS = "letters"
TITLES_AT_ONCE = 64


@torch.inference_mode()
def states(
    backbone: str, data: PreparedData, experiment: Experiment, layers: list[int]
) -> list[Tensor]:
    """Mean state over each title after so many layers, as they are. [I, D] each."""
    model: Any = load_backbone(backbone, torch.float32).eval()
    tokenizer = load_tokenizer(backbone)
    encoder = PromptEncoder(tokenizer, data.titles, experiment.prompt, "text", "item")
    items = [encoder.item(item) for item in range(len(data.titles))]
    order = sorted(range(len(items)), key=lambda item: len(items[item]))  # little padding
    found: list[list[Tensor]] = []
    for start in trange(0, len(items), TITLES_AT_ONCE, unit="batch", mininterval=10):
        texts = items_alone([items[i] for i in order[start : start + TITLES_AT_ONCE]], encoder)
        position_GL = torch.arange(texts.ids_GL.shape[1]).expand_as(texts.ids_GL)
        hidden = model.get_decoder()(
            input_ids=texts.ids_GL,
            position_ids=position_GL,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        found.append([pool(hidden[layer], texts.mask_GL) for layer in layers])
    back = torch.tensor(order).argsort()
    return [torch.cat(chunks)[back] for chunks in zip(*found, strict=True)]


def whitened(vectors_ID: Tensor, width: int) -> Tensor:
    """Principal components, at equal variance, of rows of unit length. [I, width]."""
    centred_ID = vectors_ID.double() - vectors_ID.double().mean(0)
    centred_ID = F.normalize(centred_ID, dim=1)
    left_ID, _, _ = torch.linalg.svd(centred_ID - centred_ID.mean(0), full_matrices=False)
    return left_ID[:, :width].float()


def train(
    experiment: Experiment, data: PreparedData, items: ItemEmbeddings, titles_IF: Tensor, rows: int
) -> dict[str, Any]:
    """Keys after one pass over the training windows, and what they do on validation users."""
    task, begun = KeysTask(experiment, data, items, titles_IF), time.monotonic()
    adam = torch.optim.AdamW(task.keys.parameters(), experiment.catalogue.learning_rate)
    score, users = partial(rank.score_keys, task.keys), rank.held_out(data, "validation", rows)[0]
    start = rank.catalogue_metrics(score, users, data)
    for step in trange(task.steps, unit="step", mininterval=10):
        (asked,) = task.batches(step)
        adam.zero_grad()
        task.objective(asked)[0].backward()
        adam.step()
    seconds = round(time.monotonic() - begun)
    return {"start": start, "end": rank.catalogue_metrics(score, users, data), "seconds": seconds}


def main() -> None:
    """Train every kind of key, and compare each with letters alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_storage_flag(parser)
    add_setting_flags(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 30], help="default: 12 30")
    parser.add_argument("--rows", type=int, default=4000, help="validation users (default: 4000)")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    values = parser.parse_args()
    given = overrides(values)
    own = paper.OWN_TABLES.get(given.get("data.source", ""), {})
    experiment = replace_in(Experiment(), {**SHARED, **own, **given})
    start_ray()
    pipeline = Pipeline(experiment, values.storage)
    data, items = PreparedData.open(pipeline.prepare()), ItemEmbeddings.load(pipeline.item_table())
    alone = dist.TCPStore("127.0.0.1", 0, is_master=True)
    dist.init_process_group("gloo", store=alone, rank=0, world_size=1)
    width = experiment.catalogue.title_width
    letters_IF = title_vectors(data.titles, width)
    kinds = {LETTERS: letters_IF, "letters, twice as wide": title_vectors(data.titles, 2 * width)}
    read = states(pipeline.backbone, data, experiment, values.layers)
    for layers, states_ID in zip(values.layers, read, strict=True):
        parts = letters_IF, whitened(states_ID, width)
        beside_IF = torch.cat([F.normalize(part, dim=1) for part in parts], 1)
        kinds[f"letters and states after {layers} layers"] = beside_IF
    found: dict[str, dict[str, Any]] = {}
    for name, titles_IF in kinds.items():
        print(f"\n{name}: {titles_IF.shape[1]} numbers a title", flush=True)
        found[name] = train(experiment, data, items, titles_IF, values.rows)
    table = []
    for name, one in found.items():
        for metric in ("HR@1", "MRR"):
            ours, usual = one["end"][metric], found[LETTERS]["end"][metric]
            row = {"title": name, "metric": metric, "n": len(ours), "seconds": one["seconds"]}
            row |= {"start": float(np.mean(one["start"][metric]))}
            row |= {"end": asdict(mean_interval(ours))}
            if name != LETTERS:
                row["difference"] = asdict(paired(ours, usual))
            table.append(row)
    shown = [
        {**row, "end": row["end"]["value"], "difference": shorter(row.get("difference"))}
        for row in table
    ]
    print(tabulate(shown, headers="keys", floatfmt=".4f"))
    if values.out:
        facts = {"experiment": to_dict(experiment), "split": "validation", "table": table}
        write_json(values.out, {**facts, "provenance": provenance()})


def shorter(test: dict[str, Any] | None) -> str:
    """A paired difference as it is read."""
    if test is None:
        return ""
    d = test["difference"]
    return f"{d['value']:+.4f} [{d['low']:.4f}, {d['high']:.4f}], p = {test['p']:.2g}"


if __name__ == "__main__":
    run_script(main)
