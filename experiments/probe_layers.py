"""Where in the language model is lost what slots say? Reads a tuned model's states by layer.

Takes finished cells of methods with slots and asks of all validation users, behind the embeddings
and after every layer:

directions  in how many of them the states at candidates vary
R2          what share of the variance of the candidates' own vectors, the recommender's, a linear
            map finds in those states, on items that it was not fit on
rule        MRR of the slot rule with states instead of vectors, each less the mean of candidates
pointer     MRR of comparing the last prompt state with those at candidates, as the trained pointer
            does after the last layer

    python experiments/probe_layers.py CELL.json --storage rsllm-store --out probe.json

Cost: 5 min a cell on 2 cores. Last measured: experiments/results/probe_layers/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from rsllm.assets.catalogue import resolve_backbone
from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import from_dict
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.errors import DataError
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import candidate_scores, candidate_sets, decision, target_places
from rsllm.evaluate.scorers import SLOT_RECENCY
from rsllm.flags import add_storage_flag
from rsllm.model import tuned
from rsllm.model.branches import pointer_scores
from rsllm.model.tuned import LanguageModel
from rsllm.prompts.collate import Batch, Row, collate
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.recommenders.rules import similarity
from rsllm.store.artifacts import Store, manifest, provenance, read_json, write_json
from rsllm.train.health import directions

BATCH = 8


@dataclass(frozen=True)
class States:
    """Of prompts, behind the embeddings and after each layer."""

    pointer_LRK: Tensor
    """The scores of the candidates, as the trained pointer gives them after the last layer."""
    choice_LRKD: Tensor
    """At the candidates."""
    past_LRHD: Tensor
    """At the history's slots, the newest last, 0 where there is none."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: LanguageModel, rows: Sequence[Row], keys_I: np.ndarray) -> States:
        """Run the model over all rows."""
        parts, window = [], max(len(row.history) for row in rows)
        decoder: Any = model.hybrid.eval().backbone.get_decoder()
        for start in trange(0, len(rows), BATCH, unit="batch", mininterval=10):
            batch = collate(rows[start : start + BATCH], model.encoder, keys_I, all_branches=False)
            with torch.autocast("cpu", torch.bfloat16):
                layers = decoder(
                    inputs_embeds=model.hybrid.embed(batch.ids_BT, batch.item_BT),
                    position_ids=batch.position_BT,
                    output_hidden_states=True,
                    use_cache=False,
                ).hidden_states
            flat_LND = torch.stack([layer.flatten(0, 1).bfloat16() for layer in layers])
            past_BH = history_slots(batch, window)
            shown_BH1 = (past_BH >= 0)[:, :, None]
            past_LBHD = flat_LND[:, past_BH.clamp(min=0)] * shown_BH1
            pointer_LBK = torch.stack([pointer_scores(one_ND[None], batch) for one_ND in flat_LND])
            parts.append((pointer_LBK, flat_LND[:, batch.choice_BK], past_LBHD))
        return cls(*(torch.cat(each, dim=1) for each in zip(*parts, strict=True)))


def history_slots(batch: Batch, window: int) -> Tensor:
    """Flat positions of the slots in each history, the newest last, -1 where there is none."""
    found = torch.full((len(batch.last_B), window), -1)
    for row, shown_T in enumerate(batch.history_BT & (batch.item_BT >= 0)):
        places = shown_T.nonzero()[:, 0] + row * len(shown_T)
        found[row, window - len(places) :] = places
    return found


def explained(states_ND: Tensor, vectors_NE: Tensor, fit_N: Tensor) -> float:
    """R2 of vectors by a ridge regression on states, over the rows that it was not fit on."""
    mean_D, spread_D = states_ND[fit_N].mean(0), states_ND[fit_N].std(0).clamp_min(1e-6)
    x_ND = F.pad((states_ND - mean_D) / spread_D, (0, 1), value=1.0).double()
    gram_DD = x_ND[fit_N].T @ x_ND[fit_N] + 0.01 * fit_N.sum() * torch.eye(x_ND.shape[1])
    weights_DE = torch.linalg.solve(gram_DD, x_ND[fit_N].T @ vectors_NE[fit_N].double())
    own_NE = vectors_NE[~fit_N].double()
    left = (own_NE - x_ND[~fit_N] @ weights_DE).square().sum()
    return 1 - float(left / (own_NE - own_NE.mean(0)).square().sum())


def ruled(past_RHD: Tensor, choice_RKD: Tensor) -> Tensor:
    """Scores [R, K] of the slot rule: cosines with the history, an older item counting less."""
    weight_H = SLOT_RECENCY ** torch.arange(past_RHD.shape[1] - 1.0, -1.0, -1.0)
    query_RD = torch.einsum("h,rhd->rd", weight_H, F.normalize(past_RHD, dim=2))
    return torch.einsum("rd,rkd->rk", query_RD, F.normalize(choice_RKD, dim=2))


def metrics(scores_RK: Tensor, rows: Rows) -> dict[str, float]:
    """HR@1 and MRR."""
    found = rank_metrics(target_ranks(scores_RK.double().numpy(), target_places(rows)))
    return {name: round(float(np.mean(found[name])), 4) for name in ("HR@1", "MRR")}


def measure(states: States, layer: int, vectors_IE: Tensor, rows: Rows) -> dict[str, Any]:
    """What is left after a layer."""
    choice_RKD, past_RHD = states.choice_LRKD[layer].float(), states.past_LRHD[layer].float()
    choice_ND = choice_RKD.flatten(0, 1)
    item_N = torch.from_numpy(candidate_sets(rows).astype(np.int64)).flatten()
    fit_I = torch.from_numpy(np.random.default_rng(0).random(len(vectors_IE)) < 0.5)
    mean_D, shown_RH1 = choice_ND.mean(0), past_RHD.any(dim=2, keepdim=True)
    return {
        "layer": layer,
        "directions": round(directions(choice_ND), 2),
        "R2": round(explained(choice_ND, vectors_IE[item_N], fit_I[item_N]), 4),
        "rule": metrics(ruled((past_RHD - mean_D) * shown_RH1, choice_RKD - mean_D), rows),
        "pointer": metrics(states.pointer_LRK[layer], rows),
    }


def probe(path: Path, store: Store) -> dict[str, Any]:
    """One cell: what is left after each layer, and what the vectors alone give.

    Raises:
        DataError: it is no cell of a tuned language model.
        CheckpointError: the store lacks its training, or that has no slots.
    """
    cell = read_json(path)
    if cell.get("kind") != "tuned":
        raise DataError(f"{path} is no cell of a tuned language model")
    experiment = from_dict(Experiment, cell["experiment"])
    data = PreparedData.open(store.root / "data" / cell["data"]["key"])
    judged = manifest(store.root / "evaluation" / cell["predictions"]["scores"][0])["inputs"]
    folder = store.root / "stage-2" / judged["artifact"]
    items, backbone = ItemEmbeddings.load(folder), resolve_backbone(experiment.backbone.source)
    written = experiment.stage2.representation
    model = tuned.build(experiment, written, backbone, data, items, dtype=torch.float32)
    tuned.load(model, folder)
    vectors_IE, rows = items.standardised()[: len(data.titles)].float(), data.rows("validation")
    decisions = [decision(rows, row) for row in range(len(rows))]
    states = States.of(model, decisions, data.catalogue.title_keys_I)
    rule_RI = similarity(vectors_IE.double().numpy(), SLOT_RECENCY)(rows)
    return {
        "cell": cell["key"],
        "entry": cell["entry"],
        "samples": cell["samples"],
        "training": folder.name,
        "n": len(rows),
        "vectors": {
            "directions": round(directions(vectors_IE), 2),
            "rule": metrics(torch.from_numpy(candidate_scores(rule_RI, rows)), rows),
        },
        "layers": [
            measure(states, layer, vectors_IE, rows) for layer in range(len(states.pointer_LRK))
        ],
    }


def main() -> None:
    """Probe the cells; print a table each and write all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="+", type=Path, metavar="FILE")
    add_storage_flag(parser)
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    values = parser.parse_args()
    found = []
    for path in values.cells:
        found.append(probe(path, Store.at(values.storage)))
        flat = [
            {n: v["MRR"] if isinstance(v, dict) else v for n, v in row.items()}
            for row in found[-1]["layers"]
        ]
        print(f"{found[-1]['entry']}: {found[-1]['vectors']}\n{tabulate(flat, headers='keys')}\n")
        if values.out:
            write_json(values.out, {"cells": found, "provenance": provenance()})


if __name__ == "__main__":
    run_script(main)
