"""Which way of writing an item is best? The paper's figure of item representations.

Trains the same two stages with items as numbers, as slots alone, as titles, as LLaRA's titles with
slots, and as RSLLM's titles with marker and slot, all at equal samples, and draws them in one
figure. gamma is 3, our ranking loss; --set stage2.loss.gamma=0 is the paper's.

    python experiments/compare_item_representations.py
    python experiments/compare_item_representations.py --budget hour --set stage2.loss.gamma=0
    python experiments/compare_item_representations.py --budget hour --render

Cost: 5 tuned methods a data set, see --help. Expected: RSLLM's is best, as published without
figures that could be read. Last measured: on MovieLens, one seed, see
experiments/results/compare_item_representations/.
"""

from __future__ import annotations

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, run
from rsllm.study.paper import BASE, RANKED
from rsllm.study.results import Entry

REPRESENTATIONS = {
    "number": "index",
    "slot alone": "behavioural",
    "title": "text",
    "LLaRA's": "llara",
    "RSLLM's": "unified",
}


def entries(base: Experiment) -> list[Entry]:
    """One for each way of writing an item, beside the recommender that fills the slots."""
    tuned = [
        Entry(name=name, settings={"stage2.representation": representation})
        for name, representation in REPRESENTATIONS.items()
    ]
    return [*tuned, Entry(name="recommender", kind="recommender")]


*OTHERS, OURS = REPRESENTATIONS
GRID = Grid(
    title="Compare item representations",
    question="Which way of writing an item is best?",
    base=replace_in(BASE, RANKED),
    entries=entries,
    claims=[
        Claim(text=f"RSLLM's representation beats {other}", first=OURS, second=other)
        for other in OTHERS
    ],
    notes=[
        "Stage 1 is on titles for all; stage 2 differs in how items are written alone.",
        "The figures of RSLLM and LLaRA on this question are only drawn, so none stand here.",
    ],
)


if __name__ == "__main__":
    run_script(lambda: run(GRID, __doc__ or "", __file__))
