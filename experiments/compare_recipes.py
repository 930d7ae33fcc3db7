"""What makes a small language model learn from slots fastest?

Tunes one recipe after the other from the same backbone and item table and compares them on the
validation users: learning curves, mean reciprocal rank and HR@1 with intervals, paired tests
against the plain recipe, samples and seconds. Only validation is looked at. Learning fast is a
matter of both: a verdict is for each recipe's samples, "ahead" for equal seconds of training.
--seeds trains every recipe several times (experiments/README.md: how to read it).

    python experiments/compare_recipes.py
    python experiments/compare_recipes.py --only pointer --only "batch 4" --seeds 3
    python experiments/compare_recipes.py --only letters --set stage2.samples=1024

Cost: about 6 min per recipe and seed on 2 cores with bf16. Last measured:
experiments/results/compare_recipes/.
"""

from __future__ import annotations

from typing import Any

from rsllm import Experiment, replace_in
from rsllm.cli import run_script
from rsllm.config.plain import to_dict
from rsllm.flags import Budget, parse
from rsllm.study.claims import Claim
from rsllm.study.study import Study, run

BASE = replace_in(
    Experiment(),
    {
        "stage1.samples": 0,
        "stage2.loss.alpha": 0.0,
        "stage2.loss.beta": 0.0,
        "stage2.loss.gamma": 3.0,
        "stage2.loss.scorer": "pointer",
        "stage2.validations": 2,
        "evaluation.generation_rows": -1,
    },
)

BUDGETS = {
    "short": Budget(
        summary="6 min per recipe on 2 cores with bf16",
        seeds=1,
        overrides={"stage2.samples": 512},
    )
}

PLAIN = "pointer"
RECIPES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "gentle projector": {"stage2.projector_learning_rate": 1e-3},
    "learning rates x 2": {
        "stage2.lora_learning_rate": 1e-3,
        "stage2.projector_learning_rate": 1e-2,
    },
    "projector starts at titles": {"projector.start": "titles"},
    "slots start 10 times as long": {"projector.scale": 10.0},
    "slots start 15 times as long, LoRA rate x 2": {
        "projector.scale": 15.0,
        "stage2.lora_learning_rate": 1e-3,
    },
    "batch 4": {"stage2.batch_size": 4},
    "contrasts": {"stage2.loss.alpha": 0.1, "stage2.loss.beta": 0.05},
    "without slots": {"stage2.representation": "text"},
    "letters": {"prompt.answer": "letter", "stage2.loss.scorer": "likelihood"},
    "title likelihood": {"stage2.loss.scorer": "likelihood"},
    "pointer, then title likelihood": {
        "stage1.representation": "unified",
        "stage1.loss": to_dict(BASE.stage2.loss),
        "stage1.samples": 0.5,
        "stage2.samples": 0.5,
        "stage2.loss.scorer": "likelihood",
    },
    "pointer, then contrasts": {
        "stage1.representation": "unified",
        "stage1.loss": to_dict(BASE.stage2.loss),
        "stage1.samples": 0.5,
        "stage2.samples": 0.5,
        "stage2.loss.alpha": 0.1,
        "stage2.loss.beta": 0.05,
    },
    "slots alone, then unified": {
        "stage1.representation": "behavioural",
        "stage1.loss": to_dict(BASE.stage2.loss),
        "stage1.samples": 2.0,
        "stage2.samples": 0.5,
    },
}
"""Paths into `Experiment`; samples are shares of the budget's."""


def recipe(name: str, samples: int) -> dict[str, Any]:
    """What a recipe changes, for a budget of samples."""
    shares = {"stage2.samples": 1.0} | RECIPES[name]
    counts = {p: round(samples * v) for p, v in shares.items() if p.endswith(".samples")}
    return {**shares, **counts}


def main() -> None:
    """Compare the recipes; print and write the tables."""
    arguments = parse(__doc__ or "", BUDGETS, BASE, variants=list(RECIPES))
    names = arguments.only or tuple(RECIPES)
    base = arguments.experiment
    study = Study(
        title="Compare recipes",
        question="What makes a small language model learn from slots fastest?",
        base=base,
        twins=lambda nothing: {name: recipe(name, base.stage2.samples) for name in names},
        num_seeds=arguments.seeds,
        claims=[Claim(name, PLAIN) for name in names if name != PLAIN],
        split="validation",
        budget={"name": arguments.budget_name},
    )
    run(study, arguments.storage)


if __name__ == "__main__":
    run_script(main)
