"""What does quality cost: samples, tokens, seconds, parameters? In place of figures 2, 4 and 5.

The paper has a figure of efficiency per recommender, whose axes are not known. Here RSLLM on each
recommender is trained on an eighth, a quarter, half and all of the samples, beside its twin without
slots and its twin that learns at every position of a history, the recommender alone on a 300th to
all of its epochs, and with other ranks of LoRA. The figure shows HR@1 by samples, by tokens, by
seconds of training and by trained numbers. gamma is 3, our ranking loss; --set stage2.loss.gamma=0
is the paper's.

    python experiments/measure_efficiency.py
    python experiments/measure_efficiency.py --budget hour --only SASRec --only "RSLLM (SASRec)"
    python experiments/measure_efficiency.py --budget hour --render

Cost: 22 tuned methods a data set, together as long as 10 on all samples, see --help; recommenders
take seconds. Expected: not known. Last measured: RSLLM on SASRec by samples and recommenders by
epochs, on MovieLens, see experiments/results/measure_efficiency/.
"""

from __future__ import annotations

from typing import Any

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.models import recommender_titles
from rsllm.config.plain import replace_in
from rsllm.config.presets import HISTORIES
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, run
from rsllm.study.paper import BASE, RANKED
from rsllm.study.results import Entry

MODELS = recommender_titles()
SHARES = {", 1/8": 8, ", 1/4": 4, ", 1/2": 2, "": 1}
"""By suffix of the name, the part of the samples of stage 2."""
EPOCHS = {", 1/300": 300, ", 1/100": 100, ", 1/30": 30, ", 1/10": 10, "": 1}
"""And the part of the most epochs that a recommender may take."""
RANKS = {", LoRA rank 4": 4, "": 16, ", LoRA rank 64": 64}
TUNED: dict[str, dict[str, Any]] = {
    f"RSLLM ({name})": {"recommender.model": model} for name, model in MODELS.items()
}
TEXT, MAIN, HISTORY = "text only", "RSLLM (SASRec)", "RSLLM (SASRec), histories"
SERIES: dict[str, dict[str, Any]] = {
    **TUNED,
    TEXT: {"stage2.representation": "text"},
    HISTORY: {
        **HISTORIES,
        "stage2.batch_size": BASE.stage2.batch_size,
        "stage2.loss.gamma": 0.0,
        **TUNED[MAIN],
    },
}


def entries(base: Experiment) -> list[Entry]:
    """Recommenders, each tuned method on a part of the samples, and other ranks."""
    most = base.recommender.max_epochs
    found = [
        Entry(
            name=name + suffix,
            kind="recommender",
            settings={"recommender.model": model, "recommender.max_epochs": most / part},
        )
        for name, model in MODELS.items()
        for suffix, part in EPOCHS.items()
    ]
    for suffix, part in SHARES.items():
        batch = base.stage2.batch_size
        samples = {"stage2.samples": max(1, base.stage2.samples // part // batch) * batch}
        found += [
            Entry(name=name + suffix, settings={**settings, **samples})
            for name, settings in SERIES.items()
        ]
    ranks = {suffix: rank for suffix, rank in RANKS.items() if suffix}
    return found + [
        Entry(name=MAIN + suffix, settings={**TUNED[MAIN], "backbone.lora_rank": rank})
        for suffix, rank in ranks.items()
    ]


def better(text: str, first: str, second: str) -> Claim:
    """What would be shown if `first` is better than `second`."""
    return Claim(text=text, first=first, second=second)


BY_SAMPLES = {name: [name + suffix for suffix in SHARES] for name in SERIES}
BY_SAMPLES |= {name: [name + suffix for suffix in EPOCHS] for name in MODELS}
GRID = Grid(
    title="Measure efficiency",
    question="What does quality cost in samples, tokens, seconds and trained numbers?",
    base=replace_in(BASE, RANKED),
    entries=entries,
    claims=[
        *(better(f"RSLLM beats {name}", f"RSLLM ({name})", name) for name in MODELS),
        *(
            better(f"slots help at equal samples{suffix}", MAIN + suffix, TEXT + suffix)
            for suffix in SHARES
        ),
        *(
            better(f"every position helps at equal prompts{s}", HISTORY + s, MAIN + s)
            for s in SHARES
        ),
        better("a quarter of the samples with slots beats all on text", f"{MAIN}, 1/4", TEXT),
        better("twice the samples help", MAIN, f"{MAIN}, 1/2"),
        better("a rank of 64 beats one of 4", f"{MAIN}, LoRA rank 64", f"{MAIN}, LoRA rank 4"),
    ],
    notes=[
        "Every point is a training of its own, with its whole schedule; stage 1 is the same for all"
        " tuned methods, and its samples, tokens and seconds count; histories have none.",
        "No row comes twice before all training rows were seen, and fewer samples are the first of"
        " more, so they are fewer data. A whole recommender sees all rows, for several epochs; its"
        " parts are of the most that it may take, before which it stops by itself, and less than"
        " an epoch is a part of the rows. Its other settings were tuned for the whole.",
        "Costs of RSLLM leave out its recommender's, which is a point and a level of its own. A"
        " recommender's tokens are the items of its histories.",
        "Seconds are of one machine under what else ran on it; tokens and samples are not.",
    ],
    curves={
        **dict.fromkeys(("samples", "tokens", "seconds"), BY_SAMPLES),
        "trainable": {
            f"{MAIN}, by LoRA rank": [MAIN + suffix for suffix in RANKS],
            **{name: [name] for name in MODELS},
        },
    },
)


if __name__ == "__main__":
    run_script(lambda: run(GRID, __doc__ or "", __file__))
