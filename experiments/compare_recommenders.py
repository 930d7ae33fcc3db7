"""How strong are traditional recommenders, and what do rules that learn nothing score?

Fits GRU4Rec, Caser and SASRec with the settings tuned for each data set, a SASRec as LLaRA's origin
trains it, a MoRec-like one over title vectors and twins on shuffled histories, over several seeds,
beside rules without gradients. Metrics are exact expectations over uniform candidate draws, means
over seeds, with 95 % intervals over users x seeds; published figures stand beside them.

    python experiments/compare_recommenders.py
    python experiments/compare_recommenders.py --only llara-lastfm --seeds 5

LLaRA's data sets are compared if they were imported (`experiments/import_llara.py`).
The test split is opened once per data set, after all fits. LLaRA's LastFM is in one global order of
items: what is measured there is how well a model finds that order, not how people listen.

Cost: about 40 min on 2 cores. Last measured: experiments/results/compare_recommenders/.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from rsllm import Experiment, Pipeline, RsllmError, replace_in
from rsllm.cli import run_script
from rsllm.compute.start import start_ray
from rsllm.config.models import recommender_titles
from rsllm.config.presets import preset
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.compare import estimates
from rsllm.evaluate.run import Method, Outcome, evaluate
from rsllm.pipeline import run_all
from rsllm.recommenders import SEEN
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.recommenders.rules import RULES
from rsllm.store.artifacts import Store, provenance, read_json, write_json
from rsllm.study import claims as tests
from rsllm.study.claims import Claim
from rsllm.study.results import results_folder

GIVEN = {"data.split": "given"}
DATA: dict[str, dict[str, Any]] = {
    "movielens-100k": {},
    "llara-lastfm": GIVEN,
    "llara-steam-sample": GIVEN,
}
SAMPLED = {"llara-steam-sample"}
"""Too few training rows to ask what the order of a history is worth."""
PUBLISHED = {
    "movielens-100k": {"GRU4Rec": 0.3750, "Caser": 0.3861, "SASRec": 0.3444, "MoRec-like": 0.2822},
    "llara-lastfm": {"GRU4Rec": 0.2616, "Caser": 0.2233, "SASRec": 0.2233, "MoRec-like": 0.1652},
    "llara-steam-sample": {
        "GRU4Rec": 0.4168,
        "Caser": 0.4368,
        "SASRec": 0.4010,
        "MoRec-like": 0.3911,
    },
}
"""HitRatio@1 in LLaRA's Table 2 (arXiv 2312.02445v4); the Steam ones saw all training rows."""
MODELS = recommender_titles()
AS_PUBLISHED = {
    "recommender.model": "sasrec",
    "recommender.loss": "bce",
    "recommender.num_negatives": 1,
    "recommender.num_blocks": 1,
    "recommender.dropout": 0.1,
    "recommender.weight_decay": 1e-6,
}
"""LLaRA's origin: one block, binary cross-entropy with one negative."""
SHOWN = ("HR@1", "HR@5", "NDCG@10")
FILMS = (
    "Star Wars",
    "Toy Story",
    "Pulp Fiction",
    "Titanic",
    "The Godfather",
    "Alien",
    "Casablanca",
    "The Lion King",
    "Jurassic Park",
    "Psycho",
)


def variants(source: str) -> dict[str, dict[str, Any]]:
    """What is fitted: a name and paths into `Experiment`."""
    tuned = {name: preset(model, source) for name, model in MODELS.items()}
    shuffled = {
        f"{name}, shuffled histories": {**settings, "recommender.shuffle_history": True}
        for name, settings in tuned.items()
        if source not in SAMPLED
    }
    return {
        **tuned,
        "MoRec-like": {**tuned["SASRec"], "recommender.items": "title"},
        "SASRec as published": AS_PUBLISHED,
        **shuffled,
    }


def compare(source: str, seeds: int, storage: str) -> dict[str, Any]:
    """Fit and judge everything on one data set."""
    base = replace_in(
        Experiment(),
        {"data.source": source, "compute.threads": 1, "recommender.max_epochs": 30.0}
        | DATA[source],
    )
    settings = variants(source)
    plan = [(name, seed) for name in settings for seed in range(seeds)]
    pipelines = [
        Pipeline(
            replace_in(base, {**settings[name], "recommender.seed": seed}),
            storage,
            watched="recommender",
        )
        for name, seed in plan
    ]
    usual = Pipeline(base, storage)
    data, titles = PreparedData.open(usual.prepare()), usual.title_vectors()
    folders = run_all(pipelines)
    methods = [
        Method(
            name=f"{name}/{seed}",
            scorer="recommender",
            experiment=pipeline.experiment,
            artifact=str(folder),
        )
        for (name, seed), pipeline, folder in zip(plan, pipelines, folders, strict=True)
    ]
    methods += [Method(name=rule, scorer=rule, experiment=base) for rule in RULES]
    methods.append(
        Method(
            name="title-similarity",
            scorer="title-similarity",
            experiment=base,
            artifact=str(titles),
        )
    )
    where: dict[str, Any] = {
        "data": data.path,
        "backbone": "",
        "fingerprint": "",
        "layout": usual.layout,
        "store": usual.store,
    }
    found = {
        split: _over_seeds(evaluate(methods, split, **where)) for split in ("validation", "test")
    }
    seen = {name: _seen(folders, plan, name) for name in settings}
    films = (
        _neighbours(folders[plan.index(("SASRec", 0))], data) if source.startswith("movie") else {}
    )
    return {
        "settings": settings,
        "seeds": seeds,
        "tables": {split: _table(each, source, seen) for split, each in found.items()},
        "pairs": {split: _pairs(each) for split, each in found.items()},
        "neighbours": films,
    }


def _over_seeds(outcomes: list[Outcome]) -> dict[str, dict[str, np.ndarray]]:
    """Each method's metrics [seeds, users], and its mean HR@1 of each seed."""
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.method.name.split("/")[0], []).append(outcome)
    return {
        name: {
            metric: np.stack([outcome.expected[metric] for outcome in group])
            for metric in group[0].expected
        }
        | {
            f"{metric} of all titles": np.stack([o.catalogue[metric] for o in group])
            for metric in ("HR@10", "NDCG@10")
        }
        | {"HR@1 of each seed": np.array([outcome.expected["HR@1"].mean() for outcome in group])}
        for name, group in grouped.items()
    }


def _seen(folders: list[Path], plan: list[tuple[str, int]], name: str) -> float:
    """HR@1 on training rows: how much surer their slots are."""
    found = [f for f, (other, _) in zip(folders, plan, strict=True) if other == name]
    return float(np.mean([read_json(folder / SEEN)["HR@1"] for folder in found]))


def _table(
    found: Mapping[str, Mapping[str, np.ndarray]], source: str, seen: Mapping[str, float]
) -> list[dict[str, Any]]:
    rows = []
    for name, vectors in found.items():
        per_user = {metric: values for metric, values in vectors.items() if "seed" not in metric}
        table = estimates(per_user)
        published = PUBLISHED[source].get(name.removesuffix(" as published"))
        row = {"method": name, "metrics": table, "published": published, "verdict": None}
        row |= {
            "seeds": vectors["HR@1 of each seed"].tolist(),
            "HR@1 on training rows": seen.get(name),
        }
        if published is not None:
            ours = table["HR@1"]
            inside = ours["low"] <= published <= ours["high"]
            row["verdict"] = (
                "alike" if inside else "above" if ours["value"] > published else "below"
            )
        rows.append(row)
    return sorted(rows, key=lambda row: -row["metrics"]["HR@1"]["value"])


def _pairs(found: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    claims = [Claim(name, rule) for name in MODELS for rule in ("order-rule", "markov", "item-knn")]
    claims += [Claim(name, f"{name}, shuffled histories") for name in MODELS]
    claims += [Claim("SASRec", other) for other in ("SASRec as published", "MoRec-like")]
    claims += [Claim("SASRec", other) for other in MODELS if other != "SASRec"]
    return tests.compare(found, [c for c in claims if c.second in found], ["HR@1"])


def _neighbours(folder: Path, data: PreparedData) -> dict[str, list[str]]:
    table_IE = ItemEmbeddings.load(folder).table_IE
    places = {title: data.titles.index(title) for title in FILMS if title in data.titles}
    return {t: [data.titles[i] for i in nearest(table_IE, at, 5)] for t, at in places.items()}


def nearest(table_IE: torch.Tensor, item: int, count: int) -> list[int]:
    """The items of most similar vectors by cosine, the most similar first."""
    unit_IE = torch.nn.functional.normalize(table_IE, dim=1)
    similar_I = unit_IE @ unit_IE[item]
    similar_I[[item, *torch.where(~table_IE.any(dim=1))[0].tolist()]] = -torch.inf
    return similar_I.topk(count).indices.tolist()


def _printed(table: list[dict[str, Any]]) -> str:
    def cell(estimate: Mapping[str, float]) -> str:
        return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"

    rows = [
        {"method": row["method"]}
        | {metric: cell(row["metrics"][metric]) for metric in SHOWN}
        | {
            "NDCG@10 of all titles": f"{row['metrics']['NDCG@10 of all titles']['value']:.3f}",
            "HR@1 on training rows": row["HR@1 on training rows"],
            "published HR@1": row["published"],
            "ours is": row["verdict"],
        }
        for row in table
    ]
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f", missingval="-")


def main() -> None:
    """Compare on each data set that is there; print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=DATA, action="append", help="data sets (default: all)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="fits of each recommender (default: 3)"
    )
    parser.add_argument("--storage", default="rsllm-store", metavar="DIR|URI")
    arguments = parser.parse_args()
    store = Store.open(arguments.storage)
    print(f"Ray dashboard: {start_ray()}  (its token: ray get-auth-token)", flush=True)
    for source in arguments.only or DATA:
        try:
            result = compare(source, arguments.seeds, arguments.storage)
        except RsllmError as error:
            print(f"{source} is left out: {str(error).splitlines()[-1].strip()}\n", flush=True)
            continue
        with results_folder(store, "compare_recommenders") as folder:
            found = {"data": source, **result, "provenance": provenance()}
            write_json(folder / f"{source}.json", found)
        print(f"\n{source}, test\n{_printed(result['tables']['test'])}\n", flush=True)
        for title, near in result["neighbours"].items():
            print(f"{title}: {', '.join(near)}", flush=True)


if __name__ == "__main__":
    run_script(main)
