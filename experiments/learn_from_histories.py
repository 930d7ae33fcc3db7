"""Does RSLLM pass its own recommender, once it learns from every position of a history?

History prompts put the paper's losses at every position (an extension of ours), and rank the whole
catalogue. What they have to beat stands beside them, by the same rows and candidate draws: the
recommender of their slots, that recommender with the similarity of titles by one weight, and their
own keys before a language model reads anything.

    python experiments/learn_from_histories.py                                # MovieLens-100K
    python experiments/learn_from_histories.py --data toys --seeds 3
    python experiments/learn_from_histories.py --render                       # what is on file

Toys and Steam are at hand only for those who have them (`rsllm fetch toys --from FOLDER`). The
lower 12 layers of the backbone read; `--set backbone.layers=0` takes all.

Cost: see --help. Expected: above the recommender where titles say something (Toys), level with it
where they do not. Last measured: experiments/results/learn_from_histories/.
"""

from __future__ import annotations

from typing import Any

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.config.presets import HISTORIES
from rsllm.flags import Budget
from rsllm.study import paper
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, run
from rsllm.study.results import Entry

OURS, ALONE, BOTH, KEYS = "RSLLM, histories", "SASRec", "SASRec + titles", "keys alone"
GATED = "eSASRec"
"""It was added when results were on file, and has SASRec's settings."""
TEXT, LLARA = "text only, histories", "LLaRA's form, histories"
BARE, ONE = "no contrast of targets", "contrast of users alone"
SHARED: dict[str, Any] = {"data.num_draws": 8}
CROSS_FITTED = {"recommender.folds": 4, "catalogue.max_epochs": 1.0}
"""Where a recommender knows its training rows by heart, keys that learn on its vectors of these
rows trust them too much (LOG.md)."""
DATA = {
    "movielens-100k, all users": {**paper.DATA["movielens-100k, all users"], **SHARED},
    **{name: {**own, **SHARED, **CROSS_FITTED} for name, own in paper.OWN_TABLES.items()},
}
BUDGETS = {
    "quick": Budget(
        summary="256 prompts, about 3,500 next items: shows the flow",
        seeds=1,
        overrides={
            "recommender.max_epochs": 3.0,
            "stage2.samples": 256,
            "evaluation.validation_rows": 200,
            "evaluation.test_rows": 300,
        },
    ),
    "hour": Budget(
        summary="2,048 prompts, half an epoch of MovieLens: minutes a method and seed",
        seeds=3,
        overrides={
            "stage2.samples": 2048,
            "stage2.validations": 2,
            "evaluation.validation_rows": 500,
            "evaluation.test_rows": 4000,
        },
    ),
}


def entries(base: Experiment) -> list[Entry]:
    """What is compared on every data set."""
    shuffled = {"projector.shuffle_items": True}
    return [
        Entry(name="popularity", kind="popularity"),
        Entry(name="titles by their letters", kind="title-ngrams"),
        Entry(name=ALONE, kind="recommender"),
        Entry(name=GATED, kind="recommender", settings={"recommender.model": "esasrec"}),
        Entry(name=BOTH, kind="recommender + titles"),
        Entry(name=KEYS, kind="keys"),
        Entry(name=OURS),
        Entry(name=TEXT, settings={"stage2.representation": "text"}),
        Entry(name=LLARA, settings={"stage2.representation": "llara"}),
        Entry(name=BARE, settings={"stage2.loss.alpha": 0.0}),
        Entry(name=ONE, settings={"stage2.loss.alpha": 0.0, "stage2.loss.beta": 1.0}),
        Entry(name=f"{OURS}, shuffled histories", judged={"evaluation.shuffle_history": True}),
        Entry(name=f"{OURS}, shuffled slots", judged=shuffled),
        Entry(name=f"{OURS}, shuffled titles", judged={"shuffle_titles": True}),
    ]


def claim(text: str, second: str) -> Claim:
    """What RSLLM on histories is compared with."""
    return Claim(text=text, first=OURS, second=second)


GRID = Grid(
    title="Learn from histories",
    question="Does RSLLM pass its own recommender, once it learns from every position?",
    base=replace_in(paper.BASE, HISTORIES),
    entries=entries,
    claims=[
        claim("it beats the recommender of its slots", ALONE),
        claim("it beats a recommender with gated layers", GATED),
        claim("it beats the recommender and titles, by one weight", BOTH),
        claim("the language model adds to the keys", KEYS),
        claim("slots help", TEXT),
        claim("it beats LLaRA's form", LLARA),
        claim("the contrast of targets helps", BARE),
        claim("the other two losses help", ONE),
        claim("it reads its histories in order", f"{OURS}, shuffled histories"),
        claim("it reads its slots", f"{OURS}, shuffled slots"),
        claim("it reads its titles", f"{OURS}, shuffled titles"),
    ],
    budgets=BUDGETS,
    data=DATA,
    notes=[
        "History prompts, their keys and the catalogue scorer are ours; choice prompts are the"
        " paper's form.",
        "Keys alone: the recommender's vectors and titles' letters, weighed by L_UT at every"
        " position; no language model.",
    ],
)


if __name__ == "__main__":
    run_script(lambda: run(GRID, __doc__ or "", __file__))
