"""Does RSLLM help, once: against its own twins, the recommender, and language-model baselines?

Runs the whole pipeline once for one data set: preparation, recommender, stage 1 on text, stage 2 on
unified prompts; then twins at equal samples without the contrasts and without slots, and compares
them on the test split, which is opened once. --only chooses others, such as the baselines below;
--seeds trains all of them on several seeds of stage 2 (experiments/README.md: how to read it).

    python experiments/train_rsllm.py                            # on this machine
    python experiments/train_rsllm.py --seeds 3
    python experiments/train_rsllm.py --only LLaRA-like --only TALLRec-like
    python experiments/train_rsllm.py --data llara-lastfm --set data.split=given
    ray submit cluster/gpu.yaml experiments/train_rsllm.py       # on a cluster

Cost: see `--help`. Last measured: experiments/results/train_rsllm/ ("full": not yet run).
"""

from __future__ import annotations

from typing import Any

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.flags import Budget, parse
from rsllm.study.claims import Claim
from rsllm.study.study import BY_LIKELIHOOD, Study, run

BASE = replace_in(
    Experiment(),
    {
        "stage2.loss.gamma": 3.0,
        "stage2.loss.scorer": "pointer",
        "stage2.validations": 4,
        "evaluation.decoding": ["free", "constrained"],
        "evaluation.candidate_orders": 4,
    },
)

BUDGETS = {
    "quick": Budget(
        summary="the shortest, not yet timed: shows the flow",
        seeds=1,
        overrides={
            "recommender.max_epochs": 3.0,
            "stage1.samples": 32,
            "stage2.samples": 96,
            "stage2.validations": 2,
            "evaluation.validation_rows": 48,
            "evaluation.test_rows": 48,
            "evaluation.generation_rows": 8,
            "evaluation.max_new_tokens": 16,
            "evaluation.candidate_orders": 1,
        },
    ),
    "hour": Budget(
        summary="about an hour on 2 cores",
        seeds=1,
        overrides={
            "stage1.samples": 96,
            "stage2.samples": 640,
            "evaluation.generation_rows": 24,
            "evaluation.max_new_tokens": 24,
            "evaluation.candidate_orders": 2,
        },
    ),
    "full": Budget(
        summary="for GPUs, not yet measured: every held-out row, a long schedule, three seeds",
        seeds=3,
        overrides={
            "stage1.samples": 8192,
            "stage1.batch_size": 32,
            "stage2.samples": 49152,
            "stage2.batch_size": 64,
            "stage2.validations": 8,
        },
    ),
}

NO_CONTRASTS = {"stage2.loss.alpha": 0.0, "stage2.loss.beta": 0.0}
LANGUAGE_MODEL = {**NO_CONTRASTS, "stage2.loss.gamma": 0.0}
LLARA = {"stage1.samples": 0, "stage2.representation": "llara", "stage2.curriculum": True}
MAIN, NO_CONTRAST, NO_SLOTS = "RSLLM + pointer", "without contrasts", "without slots"
TWINS: dict[str, dict[str, Any]] = {
    MAIN: {},
    NO_CONTRAST: NO_CONTRASTS,
    NO_SLOTS: {"stage2.representation": "text"},
}
BASELINES: dict[str, dict[str, Any]] = {
    "RSLLM, no extension": {"stage2.loss.gamma": 0.0},
    "LLaRA-like": {**LANGUAGE_MODEL, **LLARA},
    "LLaRA-like + pointer": {**NO_CONTRASTS, **LLARA},
    "TALLRec-like": {**LANGUAGE_MODEL, "stage2.representation": "text"},
    "LlamaRec-like": {
        **NO_CONTRASTS,
        "stage1.samples": 0,
        "stage2.representation": "text",
        "stage2.loss.scorer": "likelihood",
        "prompt.answer": "letter",
    },
}
"""Language-model baselines as configurations of the same parts, on the same rows and samples.

LLaRA (arXiv 2312.02445): title and slot, curriculum, language-model loss; with the pointer it has
our ranking loss too, as the twins have. TALLRec (arXiv
2305.00447): text alone, tuned. LlamaRec (arXiv 2311.02089): text, one letter per candidate.
"""
CLAIMS = [
    Claim(MAIN, "zero-shot", "tuning helps"),
    Claim(MAIN + BY_LIKELIHOOD, "zero-shot", "tuning helps the likelihood of titles"),
    Claim(MAIN, NO_CONTRAST, "the contrasts help"),
    Claim(MAIN, NO_SLOTS, "slots help"),
    Claim(MAIN, "recommender", "the language model beats the recommender"),
    *(Claim(MAIN, name) for name in BASELINES),
]


def main() -> None:
    """Read the flags, print the plan, train and compare."""
    known = TWINS | BASELINES
    arguments = parse(__doc__ or "", BUDGETS, BASE, variants=list(known))
    print(f"budget {arguments.budget_name}: {arguments.budget.summary}", flush=True)
    names = dict.fromkeys([MAIN, *arguments.only]) if arguments.only else TWINS
    study = Study(
        title="Train RSLLM",
        question="Does RSLLM help, against its own twins, the recommender and other baselines?",
        base=arguments.experiment,
        twins=lambda nothing: {name: known[name] for name in names},
        num_seeds=arguments.seeds,
        claims=CLAIMS,
        budget={"name": arguments.budget_name},
    )
    run(study, arguments.storage)


if __name__ == "__main__":
    run_script(main)
