"""What do slots say without the language model, before and after the projector?

Takes finished trainings of stage 2 and ranks the validation users by a rule that learns nothing:
the cosine of a candidate's vector with the history's, each item counting so many times what the
next one does (0: the last one alone). Once with the recommender's vectors, once with what the
trained projector makes of them. Also says in how many directions either vary.

    python experiments/probe_slots.py rsllm-store/stage-2/KEY rsllm-store/stage-2/OTHER
    python experiments/probe_slots.py rsllm-store/stage-2/* --out probe.json

Cost: seconds a training. Last measured: experiments/results/probe_slots/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate

from rsllm.cli import run_script
from rsllm.config import ProjectorConfig
from rsllm.data.prepared import PreparedData
from rsllm.errors import DataError
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import candidate_scores, held_out, target_places
from rsllm.evaluate.scorers import SLOT_RECENCY
from rsllm.model.hybrid import ItemSlots
from rsllm.model.tuned import PROJECTOR
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.recommenders.rules import similarity
from rsllm.store.artifacts import manifest, provenance, read_json, write_json
from rsllm.train.health import directions

RECENCIES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0)


def probe(folder: Path) -> dict[str, Any]:
    """One training: its settings and score, and what the rule makes of its vectors."""
    if not (folder / PROJECTOR).exists():
        raise DataError(f"{folder} has no {PROJECTOR}; name the folder of a training with slots")
    inputs = manifest(folder)["inputs"]
    data = PreparedData.open(folder.resolve().parents[1] / "data" / inputs["data"])
    vectors_IE = ItemEmbeddings.load(folder).standardised()[: len(data.titles)]
    known_I = vectors_IE.any(dim=1)
    slots_ID = projected(folder, vectors_IE, inputs["projector"]) * known_I[:, None]
    end = read_json(folder / "training.json")["curve"][-1]
    return {
        "training": folder.name,
        "recommender": inputs["recommender"],
        "projector": inputs["projector"],
        "stage": inputs["stage"],
        "validation": {"MRR": end["MRR"], "HR@1": end["HR@1"]},
        "vectors": {"directions": directions(vectors_IE[known_I]), **ruled(vectors_IE, data)},
        "slots": {"directions": directions(slots_ID[known_I]), **ruled(slots_ID, data)},
    }


@torch.no_grad()
def projected(folder: Path, vectors_IE: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """What the trained projector makes of all vectors. [I, D]"""
    tensors = load_file(folder / PROJECTOR)
    no_tokens_VD = torch.zeros(1, len(tensors["marker_D"]))
    slots = ItemSlots(vectors_IE, no_tokens_VD, ProjectorConfig(**config))
    slots.load_state_dict(tensors)
    return slots.projected(torch.arange(len(vectors_IE)))


def ruled(vectors_ID: torch.Tensor, data: PreparedData) -> dict[str, Any]:
    """HR@1 and MRR on all validation users, by what an item counts beside the next one."""
    (rows, *_), found = held_out(data, "validation"), {}
    for recency in RECENCIES:
        scores_RI = similarity(vectors_ID.double().numpy(), recency)(rows)
        ranks_R = target_ranks(candidate_scores(scores_RI, rows), target_places(rows))
        metrics = rank_metrics(ranks_R)
        found[f"{recency:g}"] = {m: round(float(np.mean(metrics[m])), 4) for m in ("HR@1", "MRR")}
    return {"n": len(rows), "by_recency": found}


def main() -> None:
    """Probe the trainings; print a table and write all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainings", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    values = parser.parse_args()
    found, usual = [probe(folder) for folder in values.trainings], f"{SLOT_RECENCY:g}"
    rows = [
        {
            "training": one["training"],
            "samples": one["stage"]["samples"],
            "validation MRR": one["validation"]["MRR"],
        }
        | {f"{name}: directions": one[name]["directions"] for name in ("vectors", "slots")}
        | {f"{name}: MRR": one[name]["by_recency"][usual]["MRR"] for name in ("vectors", "slots")}
        for one in found
    ]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if values.out:
        write_json(values.out, {"trainings": found, "provenance": provenance()})


if __name__ == "__main__":
    run_script(main)
