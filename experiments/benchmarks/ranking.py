"""How fast is ranking all candidates in one pass, against one forward per candidate and generation?

Four ways to say which candidate comes next, on the same MovieLens-100K validation users with the
untuned backbone in fp32: one pass over the prompt and its 20 answers as branches; 20 plain forwards
per user (prompt and one answer each, logits of the answer only), for the first users of each round,
since they are slow; batched greedy generation of 64 new tokens of which the first line is kept, as
LLaRA does, which names one candidate at most; and the same ended by the newline, as rsllm does.
An untuned model is soon at a newline; a tuned one writes a title first. They take turns, a round of
users each; rates are medians over the rounds, ratios medians over the rounds' ratios.

    python experiments/benchmarks/ranking.py --out results.json

Cost: four minutes on two cores. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from rsllm import Experiment, Pipeline
from rsllm.cli import run_script
from rsllm.config import LossConfig
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.evaluate.generate import greedy_answers
from rsllm.evaluate.rank import decision, fixed_sample, score_candidates
from rsllm.model import tuned
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.encode import PromptEncoder
from rsllm.store.artifacts import provenance, write_json

ROUNDS, USERS, SEPARATE, NEW_TOKENS = 5, 8, 2, 64
GOALS = {"separate": 10.0, "generate": 2.0}
TOLERANCE = 1e-4


@torch.inference_mode()
def generated(objective: LanguageObjective, rows: Rows, encoder: PromptEncoder) -> list[str]:
    """The first of 64 tokens' lines, all rows in one left-padded batch."""
    decisions = [decision(rows, i) for i in range(len(rows))]
    prompts = [encoder.prompt(d.history, d.candidates, d.template).tokens.ids for d in decisions]
    left = {"batch_first": True, "padding_side": "left"}
    new_BN = objective.model.backbone.generate(
        pad_sequence([torch.tensor(ids) for ids in prompts], **left),
        attention_mask=pad_sequence([torch.ones(len(ids)) for ids in prompts], **left),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=encoder.terminator
        ),
    )[:, max(map(len, prompts)) :]
    return [text.split("\n")[0] for text in encoder.tokenizer.batch_decode(new_BN)]


@torch.inference_mode()
def separate_forwards(
    objective: LanguageObjective, rows: Rows, encoder: PromptEncoder
) -> np.ndarray:
    """Every candidate's log-probability from a plain forward over prompt and answer. [R, C]."""
    llm, scores = objective.model.backbone, []
    for i in range(len(rows)):
        row = decision(rows, i)
        prompt = encoder.prompt(row.history, row.candidates, row.template).tokens.ids
        for own in encoder.answers(row.candidates):
            answer = own + encoder.ending
            ids = torch.tensor([prompt + answer[:-1]])
            logits_TV = llm(ids, logits_to_keep=len(answer)).logits[0]
            scores.append(logits_TV.log_softmax(-1)[range(len(answer)), answer].sum().item())
    return np.array(scores).reshape(len(rows), -1)


def rounds(
    objective: LanguageObjective,
    data: PreparedData,
    encoder: PromptEncoder,
    users: int,
    number: int,
) -> tuple[list[dict[str, float]], float]:
    """Users per second of each way in each round, and the largest difference of scores."""
    sample = fixed_sample(data.rows("validation"), users * number)
    batch = {"batch_size": users}

    def one_pass(rows: Rows) -> np.ndarray:
        return score_candidates(objective, rows, encoder, data, "likelihood", **batch)

    def to_newline(rows: Rows) -> list[str]:
        return greedy_answers(
            objective, rows, encoder, data, "free", max_new_tokens=NEW_TOKENS, **batch
        )

    one_pass(sample.take(slice(0, 1)))
    found, difference = [], 0.0
    for start in range(0, len(sample), users):
        rows = sample.take(slice(start, start + users))
        ours, seconds = _timed(lambda rows=rows: one_pass(rows))
        some = rows.take(slice(0, SEPARATE))
        plain, plain_seconds = _timed(lambda rows=some: separate_forwards(objective, rows, encoder))
        _, generate_seconds = _timed(lambda rows=rows: generated(objective, rows, encoder))
        _, newline_seconds = _timed(lambda rows=rows: to_newline(rows))
        difference = max(difference, float(np.abs(ours[: len(some)] - plain).max()))
        found.append(
            {
                "one pass": len(rows) / seconds,
                "separate": len(some) / plain_seconds,
                "generate": len(rows) / generate_seconds,
                "generate to newline": len(rows) / newline_seconds,
            }
        )
    return found, difference


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def main() -> None:
    """Measure; print and write rates, ratios and the difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("rsllm-store"), metavar="DIR")
    parser.add_argument("--users", type=int, default=USERS, help="per round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipeline = Pipeline(Experiment(), arguments.storage)
    data = PreparedData.open(pipeline.prepare())
    model = tuned.build(
        Experiment(), "text", pipeline.backbone, data, None, dtype=torch.float32, lora=False
    )
    objective = LanguageObjective(model.hybrid, LossConfig()).eval()
    found, difference = rounds(objective, data, model.encoder, arguments.users, arguments.rounds)
    table = [
        {
            "way": name,
            "users/s": statistics.median(r[name] for r in found),
            "one pass is faster by": statistics.median(r["one pass"] / r[name] for r in found),
            "goal": GOALS.get(name),
        }
        for name in found[0]
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out,
        {
            "ways": table,
            "largest_score_difference": difference,
            "tolerance": TOLERANCE,
            "users_per_round": arguments.users,
            "users_per_round_separate": min(SEPARATE, arguments.users),
            "rounds": found,
            "backbone": Experiment().backbone.source,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "provenance": provenance(),
        },
    )
    print(tabulate(table, headers="keys", floatfmt=".2f"))
    print(f"largest score difference to separate forwards: {difference:.2e} (goal {TOLERANCE:.0e})")


if __name__ == "__main__":
    run_script(main)
