"""Does the language model say the next title itself, once it has read histories?

The catalogue scorer compares vectors. Here the language model answers in its own voice: by the
likelihood of the 20 candidates' titles behind a history prompt, and by the title that it writes,
which is what the paper measures (HitRatio@1). A history prompt lists no candidates, so an answer is
written along their titles (constrained), or freely, or along all titles of the catalogue.

    python experiments/speak_titles.py                                        # MovieLens-100K
    python experiments/speak_titles.py --budget hour --seeds 3
    python experiments/speak_titles.py --render                               # what is on file

All layers of the backbone read, because the lower ones alone do not write titles any more.

Cost: see --help. Expected: above tuning on text. Last measured: not after 320 prompts, where every
written answer begins with "The", see experiments/results/speak_titles/. More prompts, and choices
after histories, are not measured yet.
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

OURS, TEXT = "RSLLM", "text only"
LIKELY, WRITTEN = "by likelihood", "as written"
AFTER, ALONE = "choices after histories", "choices alone"
READS: dict[str, Any] = {**HISTORIES, "stage2.loss.beta": 0.3, "backbone.layers": 0}
"""More weight for the loss on the next title's tokens than where the catalogue scorer ranks."""
CHOOSES: dict[str, Any] = {
    "stage2.prompts": "choice",
    "stage2.batch_size": 8,
    "stage2.loss.beta": 0.05,
}
BUDGETS = {
    "quick": Budget(
        summary="64 prompts, 32 users: shows the flow",
        seeds=1,
        overrides={
            "recommender.max_epochs": 3.0,
            "stage2.samples": 64,
            "evaluation.validation_rows": 32,
            "evaluation.test_rows": 32,
            "evaluation.generation_rows": 32,
            "evaluation.max_new_tokens": 24,
        },
    ),
    "hour": Budget(
        summary="512 prompts, 9,000 next items: estimated 10 min a training and seed on 2 cores",
        seeds=1,
        overrides={
            "stage2.samples": 512,
            "evaluation.validation_rows": 100,
            "evaluation.test_rows": 300,
            "evaluation.generation_rows": 150,
            "evaluation.max_new_tokens": 24,
        },
    ),
}


def entries(base: Experiment) -> list[Entry]:
    """What is compared on every data set."""
    silent = {"evaluation.generation_rows": -1}
    likely = {"scorer": "likelihood", "evaluation.decoding": ["free", "catalogue"]}
    among = {"scorer": "written", "evaluation.decoding": ["constrained"], **silent}
    freely = {"scorer": "written", "evaluation.decoding": ["free"]}
    read = 3 * base.stage2.samples // 4
    stages = {
        **CHOOSES,
        "stage1.prompts": "history",
        "stage1.representation": "unified",
        "stage1.samples": read,
        "stage1.batch_size": 16,
        "stage1.projector_learning_rate": 2e-3,
        "stage1.loss.beta": 0.3,
        "stage2.samples": base.stage2.samples - read,
    }
    found = [
        Entry(name="popularity", kind="popularity"),
        Entry(name="SASRec", kind="recommender"),
        Entry(name="keys alone", kind="keys"),
    ]
    for how, judged in {WRITTEN: among, LIKELY: likely}.items():
        for name, parts in {TEXT: "text", OURS: "unified"}.items():
            settings = {"stage1.samples": 0, "stage2.representation": parts}
            found.append(Entry(name=f"{name}, {how}", settings=settings, judged=judged))
    whole = {"stage1.samples": 0}
    found += [
        Entry(name=f"{OURS}, catalogue scorer", settings=whole),
        Entry(name=f"{OURS}, {AFTER}", settings=stages, judged=freely),
        Entry(name=f"{OURS}, {ALONE}", settings=CHOOSES | whole, judged=freely),
        Entry(
            name=f"{TEXT}, {ALONE}",
            settings=CHOOSES | whole | {"stage2.representation": "text"},
            judged=freely,
        ),
    ]
    return found


GRID = Grid(
    title="Speak titles",
    question="Does the language model say the next title itself, once it has read histories?",
    base=replace_in(paper.BASE, READS),
    entries=entries,
    claims=[
        Claim(text=text, first=f"{OURS}, {first}", second=second)
        for text, first, second in [
            ("slots help it write", WRITTEN, f"{TEXT}, {WRITTEN}"),
            ("slots help its likelihoods", LIKELY, f"{TEXT}, {LIKELY}"),
            ("it writes better than popularity", WRITTEN, "popularity"),
            ("histories beat choices of text", WRITTEN, f"{TEXT}, {ALONE}"),
            ("histories beat choices", WRITTEN, f"{OURS}, {ALONE}"),
            ("choices profit from histories", AFTER, f"{OURS}, {ALONE}"),
            ("its vectors know more than its voice", "catalogue scorer", f"{OURS}, {WRITTEN}"),
        ]
    ],
    budgets=BUDGETS,
    data={name: paper.DATA[name] for name in ("movielens-100k, all users",)},
    notes=[
        f"HR@1 of what is judged {WRITTEN}, and of choices, is HitRatio@1: the share of users whose"
        " answer names the next item and no other candidate. MRR says no more there.",
        "Answers to history prompts go along the titles of the row's candidates; those to choice"
        " prompts are free. Under the rule catalogue an answer is any title, and a hit the next.",
    ],
)


if __name__ == "__main__":
    run_script(lambda: run(GRID, __doc__ or "", __file__))
