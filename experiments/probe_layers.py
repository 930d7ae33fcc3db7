"""Where in the language model is what slots say lost? Reads a tuned model's states by layer.

Takes finished cells of methods with slots and asks of the validation users, after every layer:

candidates  in how many directions the states at candidates vary, and what share of the variance of
            the items' own vectors a linear map finds in them, on items that it was not fit on (R2)
pointer     MRR of comparing the last prompt state with those states, as the trained pointer does
            after the last layer
query       MRR of the last prompt state alone, by the best bilinear readout: state x W x vector of
            a candidate, with W fit by cross-entropy on prompts of training rows
both        the same of that state beside the history's vectors, summed as the slot rule sums them:
            what is above the readout of those vectors alone is the language model's

    python experiments/probe_layers.py CELL.json --storage rsllm-store --out probe.json

Cost: 10 min a cell on 2 cores. Last measured: experiments/results/probe_layers/.
"""

from __future__ import annotations

import argparse
import os
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

from rsllm.assets import resolve_backbone
from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.data.prepared import PreparedData
from rsllm.errors import DataError
from rsllm.evaluate.launch import RECENCY
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import decision, fixed_sample
from rsllm.model import tuned
from rsllm.model.tuned import LanguageModel
from rsllm.prompts.collate import Row, collate
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.runs import Store, manifest, provenance, read_json, write_json
from rsllm.settings import from_dict
from rsllm.train.batches import TrainingSet
from rsllm.train.health import directions

BATCH = 8
DECAYS = (0.001, 0.01, 0.1, 1.0)
"""Of the readout's weights; the best on a fifth of the training rows is taken."""
CANDIDATE_SEED = 1000
"""Of the training rows' candidates: not those that the model was trained with."""


@dataclass(frozen=True)
class Asked:
    """Rows as a tuned model reads them, and what the vectors of their items say."""

    query_LRD: Tensor
    """The last state of each prompt: behind the embeddings, then after each layer."""
    choice_LRKD: Tensor
    """The states at its candidates."""
    past_RE: Tensor
    """Unit vectors of its history, summed as the slot rule sums them."""
    item_RK: Tensor
    vector_RKE: Tensor
    """Of its candidates."""
    target_R: Tensor
    """The target's place among them."""

    @classmethod
    def of(
        cls, model: LanguageModel, decisions: Sequence[Row], vectors_IE: Tensor, data: PreparedData
    ) -> Asked:
        """Run the model over all rows."""
        item_RK = torch.tensor([row.candidates for row in decisions])
        return cls(
            *states(model, decisions, data.catalogue.title_keys_I),
            past_RE=torch.stack([past(row.history, vectors_IE) for row in decisions]),
            item_RK=item_RK,
            vector_RKE=vectors_IE[item_RK],
            target_R=torch.tensor([list(row.candidates).index(row.target) for row in decisions]),
        )


@torch.inference_mode()
def states(
    model: LanguageModel, decisions: Sequence[Row], keys_I: np.ndarray
) -> tuple[Tensor, Tensor]:
    """The states [L, R, D] at the ends of prompts, and those at candidates [L, R, K, D]."""
    hybrid, queries, choices = model.hybrid.eval(), [], []
    decoder: Any = hybrid.backbone.get_decoder()
    for start in trange(0, len(decisions), BATCH, unit="batch", mininterval=10):
        batch = collate(decisions[start : start + BATCH], model.encoder, keys_I, all_branches=False)
        with torch.autocast("cpu", torch.bfloat16):
            layers = decoder(
                inputs_embeds=hybrid.embed(batch.ids_BT, batch.item_BT),
                position_ids=batch.position_BT,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        flat_LND = torch.stack([layer.flatten(0, 1).bfloat16() for layer in layers])
        queries.append(flat_LND[:, batch.last_B])
        choices.append(flat_LND[:, batch.choice_BK])
    return torch.cat(queries, 1), torch.cat(choices, 1)


def past(history: Sequence[int], vectors_IE: Tensor) -> Tensor:
    """Unit vectors of a history, summed; an item counts as much as the slot rule has it. [E]"""
    age_H = torch.arange(len(history) - 1, -1, -1)
    return RECENCY["slot-rule"] ** age_H @ F.normalize(vectors_IE[list(history)], dim=1)


def readout(train_RX: Tensor, fit: Asked, other_RX: Tensor, own: Asked) -> Tensor:
    """Scores [R, K] of other rows' candidates by x W v, with W fit on the training rows."""
    candidates_RKE, target_R = fit.vector_RKE, fit.target_R
    mean_X, spread_X = train_RX.mean(0), train_RX.std(0).clamp_min(1e-6)
    train_RX, other_RX = (train_RX - mean_X) / spread_X, (other_RX - mean_X) / spread_X
    cut = len(train_RX) * 4 // 5
    fits = [_fit(train_RX[:cut], candidates_RKE[:cut], target_R[:cut], d) for d in DECAYS]
    held = [
        F.cross_entropy(_scores(train_RX[cut:], w, candidates_RKE[cut:]), target_R[cut:])
        for w in fits
    ]
    best = DECAYS[int(torch.stack(held).argmin())]
    return _scores(other_RX, _fit(train_RX, candidates_RKE, target_R, best), own.vector_RKE)


def _scores(rows_RX: Tensor, weights_XE: Tensor, candidates_RKE: Tensor) -> Tensor:
    return torch.einsum("re,rke->rk", rows_RX @ weights_XE, candidates_RKE)


def _fit(rows_RX: Tensor, candidates_RKE: Tensor, target_R: Tensor, decay: float) -> Tensor:
    weights_XE = torch.zeros(rows_RX.shape[1], candidates_RKE.shape[2], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_XE], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(_scores(rows_RX, weights_XE, candidates_RKE), target_R)
        whole = found + decay * weights_XE.square().sum()
        whole.backward()  # type: ignore[no-untyped-call]
        return whole

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights_XE.detach()


def explained(states_ND: Tensor, vectors_NE: Tensor, fit_N: Tensor) -> float:
    """R2 of vectors by a ridge regression on states, over the rows that it was not fit on."""
    mean_D, spread_D = states_ND[fit_N].mean(0), states_ND[fit_N].std(0).clamp_min(1e-6)
    x_ND = F.pad((states_ND - mean_D) / spread_D, (0, 1), value=1.0).double()
    gram_DD = x_ND[fit_N].T @ x_ND[fit_N] + 0.01 * fit_N.sum() * torch.eye(x_ND.shape[1])
    weights_DE = torch.linalg.solve(gram_DD, x_ND[fit_N].T @ vectors_NE[fit_N].double())
    own_NE = vectors_NE[~fit_N].double()
    left = (own_NE - x_ND[~fit_N] @ weights_DE).square().sum()
    return 1 - float(left / (own_NE - own_NE.mean(0)).square().sum())


def metrics(scores_RK: Tensor, own: Asked) -> dict[str, float]:
    """HR@1 and MRR."""
    found = rank_metrics(target_ranks(scores_RK.double().numpy(), own.target_R.numpy()))
    return {name: round(float(np.mean(found[name])), 4) for name in ("HR@1", "MRR")}


def left(fit: Asked, own: Asked, layer: int) -> dict[str, Any]:
    """What is left after a layer, of other rows than the readouts are fit on."""
    choice_RKD, query_RD = own.choice_LRKD[layer].float(), own.query_LRD[layer].float()
    width, fit_RD = choice_RKD.shape[-1:], fit.query_LRD[layer].float()
    unit_RD, unit_RKD = F.rms_norm(query_RD, width), F.rms_norm(choice_RKD, width)
    beside = torch.cat([fit_RD, fit.past_RE], 1), torch.cat([query_RD, own.past_RE], 1)
    chosen_I = torch.from_numpy(np.random.default_rng(0).random(int(own.item_RK.max()) + 1) < 0.5)
    choice_ND, vector_NE = choice_RKD.flatten(0, 1), own.vector_RKE.flatten(0, 1)
    return {
        "layer": layer,
        "directions": round(directions(choice_ND), 2),
        "R2": round(explained(choice_ND, vector_NE, chosen_I[own.item_RK.flatten()]), 4),
        "pointer": metrics(torch.einsum("rd,rkd->rk", unit_RD, unit_RKD), own),
        "query": metrics(readout(fit_RD, fit, query_RD, own), own),
        "both": metrics(readout(beside[0], fit, beside[1], own), own),
    }


def probe(path: Path, store: Store, num_rows: int) -> dict[str, Any]:
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
    vectors_IE = items.standardised()[: len(data.titles)].float()
    train, rows = fixed_sample(data.rows("train"), num_rows), data.rows("validation")
    places = [(0, row) for row in range(len(train))]
    drawn = TrainingSet(data, train, model.encoder, 1.0).decisions(places, CANDIDATE_SEED)
    fit = Asked.of(model, drawn, vectors_IE, data)
    own = Asked.of(model, [decision(rows, row) for row in range(len(rows))], vectors_IE, data)
    rule_RK = torch.einsum("re,rke->rk", own.past_RE, F.normalize(own.vector_RKE, dim=2))
    return {
        "cell": cell["key"],
        "entry": cell["entry"],
        "training": folder.name,
        "rows": {"training": len(train), "validation": len(rows)},
        "vectors": {
            "directions": round(directions(vectors_IE), 2),
            "slot rule": metrics(rule_RK, own),
            "readout": metrics(readout(fit.past_RE, fit, own.past_RE, own), own),
        },
        "layers": [left(fit, own, layer) for layer in trange(len(fit.query_LRD), desc="layers")],
    }


def main() -> None:
    """Probe the cells; print a table each and write all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--rows", type=int, default=2048, help="training rows to fit readouts on")
    parser.add_argument("--storage", default=os.environ.get("RSLLM_STORAGE") or "rsllm-store")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    values = parser.parse_args()
    found = []
    for path in values.cells:
        found.append(probe(path, Store.at(values.storage), values.rows))
        flat = [
            {n: v["MRR"] if isinstance(v, dict) else v for n, v in row.items()}
            for row in found[-1]["layers"]
        ]
        print(f"{found[-1]['entry']}: {found[-1]['vectors']}\n{tabulate(flat, headers='keys')}\n")
        if values.out:
            write_json(values.out, {"cells": found, "provenance": provenance()})


if __name__ == "__main__":
    run_script(main)
