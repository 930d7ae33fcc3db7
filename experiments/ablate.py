"""Which part of RSLLM earns its place? The paper's ablations and rival readings of it.

Takes one part away, or puts another in its place, at equal samples: no stage 1 (direct hybrid
prompts), LLaRA's curriculum instead of it, stage 1 on a mixture of domains, no target contrast, no
user contrast, neither, a contrast of slots with titles, cross-fitted slots. gamma is 3, our ranking
loss; --set stage2.loss.gamma=0 is the paper's.

    python experiments/ablate.py
    python experiments/ablate.py --budget hour --only RSLLM --only "no contrasts"
    python experiments/ablate.py --budget hour --set stage2.loss.gamma=0 --render

The mixture needs LLaRA's data sets (`experiments/import_llara.py`).

Cost: 9 tuned methods a data set, see --help. Expected: not known; the paper says that
representation, cross-domain alignment and staged training each matter. Last measured: three
of them on MovieLens, two seeds, see experiments/results/ablate/; more of one seed in folders there.
"""

from __future__ import annotations

from typing import Any

from rsllm.cli import run_script
from rsllm.config import DataConfig, Experiment, MixedData
from rsllm.config.plain import replace_in, to_dict
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, run
from rsllm.study.paper import BASE, NO_CONTRASTS, RANKED, SOURCES
from rsllm.study.results import Entry

WHOLE = "RSLLM"


def entries(base: Experiment) -> list[Entry]:
    """The whole, and what is changed in it."""
    one_stage = {"stage1.samples": 0, "stage2.samples": base.stage1.samples + base.stage2.samples}
    changes: dict[str, dict[str, Any]] = {
        WHOLE: {},
        "no stage 1 (direct hybrid)": one_stage,
        "curriculum instead of stage 1": {**one_stage, "stage2.curriculum": True},
        "stage 1 on a mixture": {"mixture": mixture(base.data.source)},
        "no target contrast": {"stage2.loss.alpha": 0.0},
        "no user contrast": {"stage2.loss.beta": 0.0},
        "no contrasts": NO_CONTRASTS,
        "ID-text alignment": {"stage2.loss.alignment": 0.1},
        "cross-fitted slots": {"recommender.folds": 2},
    }
    return [Entry(name=name, settings=settings) for name, settings in changes.items()]


def mixture(source: str) -> list[dict[str, Any]]:
    """The other domains, in equal parts with the target's own."""
    splits = {name: given.get("data.split", "user") for name, given in SOURCES.items()}
    return [
        to_dict(MixedData(data=DataConfig(source=name, split=split)))
        for name, split in splits.items()
        if name != source
    ]


def claim(text: str, part: str, *, helps: bool = True) -> Claim:
    """The whole against the rest without a part, or against the whole with another one."""
    first, second = (WHOLE, part) if helps else (part, WHOLE)
    return Claim(text=text, first=first, second=second)


GRID = Grid(
    title="Ablate",
    question="Which part of RSLLM earns its place?",
    base=replace_in(BASE, RANKED),
    entries=entries,
    claims=[
        claim("stage 1 helps", "no stage 1 (direct hybrid)"),
        claim("stage 1 beats a curriculum", "curriculum instead of stage 1"),
        claim("other domains in stage 1 help", "stage 1 on a mixture", helps=False),
        claim("the target contrast helps", "no target contrast"),
        claim("the user contrast helps", "no user contrast"),
        claim("the contrasts help", "no contrasts"),
        claim("aligning slots with titles helps", "ID-text alignment", helps=False),
        claim("cross-fitted slots help", "cross-fitted slots", helps=False),
    ],
    notes=[
        "No figure of the paper's ablations is known, so any gain counts as the claimed one.",
        "No contrasts, no target and no user contrast: in stage 2. Stage 1, one training for all"
        " that have it, keeps them.",
    ],
)


if __name__ == "__main__":
    run_script(lambda: run(GRID, __doc__ or "", __file__))
