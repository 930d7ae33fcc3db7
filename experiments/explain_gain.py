"""Where does a gain come from: slots, titles, order, popularity, or the recommender behind it?

Trains RSLLM once and judges it again with one part of its input spoilt in evaluation alone: every
history in random order, every item under another item's title, every slot with another item's
vector; and once more unspoilt, its scores averaged over eight orders of the candidates. Beside it
stand rules that learn little (one on the vectors behind its slots), the recommender of its slots
(also with shuffled histories), both joined, and a twin that never had slots. gamma is 3, our
ranking loss by the pointer; --set stage2.loss.gamma=0 is the paper's.

    python experiments/explain_gain.py
    python experiments/explain_gain.py --budget hour --data "movielens-100k, all users"
    python experiments/explain_gain.py --budget hour --render

The page also breaks every method down by groups of targets.

Cost: 2 tuned methods a data set, see --help; the rest is evaluation. Expected: without the right
slots little is left above chance, as `train_rsllm.py` measured. Last measured:
MovieLens, two lengths of training, see experiments/results/explain_gain/.
"""

from __future__ import annotations

from typing import Any

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, run
from rsllm.study.paper import BASE, RANKED
from rsllm.study.results import Entry

WHOLE, ALONE, JOINED, TEXT = "RSLLM", "recommender", "RSLLM + recommender", "text only"
POPULARITY, ORDER, SLOTS = "popularity", "order rule", "slot rule"
SPOILT: dict[str, dict[str, Any]] = {
    "shuffled history": {"evaluation.shuffle_history": True},
    "shuffled titles": {"shuffle_titles": True},
    "shuffled slots": {"projector.shuffle_items": True},
}
AVERAGED = f"{WHOLE}, mean of 8 orders"
ORDERS = {"mean_of_orders": 8, "evaluation.generation_rows": -1}


def entries(base: Experiment) -> list[Entry]:
    """Rules, the recommender, RSLLM whole, spoilt, averaged and joined, and its twin on text."""
    history = SPOILT["shuffled history"]
    return [
        Entry(name=POPULARITY, kind="popularity"),
        Entry(name=ORDER, kind="order-rule"),
        Entry(name=ALONE, kind="recommender"),
        Entry(name=f"{ALONE}, shuffled history", kind="recommender", judged=history),
        Entry(name=SLOTS, kind="slot-rule"),
        Entry(name=WHOLE),
        *(Entry(name=f"{WHOLE}, {part}", judged=judged) for part, judged in SPOILT.items()),
        Entry(name=AVERAGED, judged=ORDERS),
        Entry(name=JOINED, fused=True),
        Entry(name=TEXT, settings={"stage2.representation": "text"}),
    ]


def better(text: str, first: str, second: str) -> Claim:
    """What would be shown if `first` is better than `second`."""
    return Claim(text=text, first=first, second=second)


GRID = Grid(
    title="Explain the gain",
    question="Where does a gain come from?",
    base=replace_in(BASE, RANKED),
    entries=entries,
    claims=[
        *(better(f"{part} cost quality", WHOLE, f"{WHOLE}, {part}") for part in SPOILT),
        better(
            "shuffled histories cost the recommender quality", ALONE, f"{ALONE}, shuffled history"
        ),
        better("slots help in training too", WHOLE, TEXT),
        better("the language model adds to the recommender", JOINED, ALONE),
        better("RSLLM beats the recommender of its slots", WHOLE, ALONE),
        better("a mean over orders of the candidates is better than one order", AVERAGED, WHOLE),
        better("RSLLM, mean of orders, beats the recommender", AVERAGED, ALONE),
        better("RSLLM beats a rule on its slots' vectors", WHOLE, SLOTS),
        better("the recommender beats a rule on its vectors", ALONE, SLOTS),
        better("RSLLM beats popularity", WHOLE, POPULARITY),
        better("RSLLM beats the order rule", WHOLE, ORDER),
        better("the recommender beats popularity", ALONE, POPULARITY),
    ],
    notes=[
        "RSLLM here is the main table's RSLLM (SASRec) + ranking, and the recommender that of its"
        " slots, SASRec unless the command names another. Histories, titles and slots are spoilt in"
        " evaluation alone, the recommender's histories too.",
        "Nothing of this is published, so any gain counts; where nothing can be told,"
        " the detectable difference says how much may be hidden.",
        "A spoilt part that costs quality is a part that the model reads. It was never trained on"
        " spoilt input, so some of the cost is surprise; the twin, which was trained without slots,"
        " bounds what slots are worth from the other side, where it has been run.",
        "A part that costs nothing was not read, or says nothing that another part does not say.",
        "Slots read and RSLLM not above its recommender: the language model passes on what the"
        " recommender knows. Joined above the recommender alone: it knows something else as well."
        " The weight of the two was chosen on validation; where it is large, little of the language"
        " model is left in the joined score, and that it adds nothing is no wonder.",
        "History read: beyond which items it holds, their order matters. Compare with what the"
        " recommender loses. Where the order rule is strong, an order of the file is read, not"
        " time.",
        "RSLLM reads its candidates in one order, and another one changes some of its first"
        " choices. The mean of its scores over eight random orders costs eight times the evaluation"
        " and no training; a recommender does not see their order.",
        "The slot rule has no language model and learns nothing: candidates stand in the order of"
        " the cosine of their recommender's vector with the history's, of which every older one"
        " counts half as much. What it reaches lies in the vectors that slots are made from; below"
        " it the projector or the language model loses some of that (probe_slots.py).",
        "What popularity reaches alone needs neither histories nor titles; whether RSLLM is better"
        " on rare targets too is in the tables by training interactions.",
    ],
)


if __name__ == "__main__":
    run_script(lambda: run(GRID, __doc__ or "", __file__))
