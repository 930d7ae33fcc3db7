"""Up to how many items is the exact product with every key cheap, so that no index is needed?

One and 32 users are scored by the keys of 10,000, 100,000 and 1,000,000 items, of width 320 (a
recommender's 64 and a title's 256), in the two dtypes that a CPU multiplies fast. The best ten of
each user are taken as `rsllm.load` takes them (`ranker.top`: it partitions, and sorts what is
left); the reference sorts all scores, and has to name the same items. `Ranker.lists` is the whole
way, with what was seen left out. Beside them stands what a language model of SmolLM2-135M's shape
(random weights, which take as long as any) spends on a user's history of 100 tokens. All is the
CPU time of one thread, which other processes change little; medians over the rounds.

    python experiments/benchmarks/exact_search.py --out results.json

Cost: three minutes on one core, and 4 GB of memory. Last measured: experiments/results/benchmarks/.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from rsllm.cli import run_script
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Catalogue
from rsllm.recommend.ranker import Ranker, top
from rsllm.store.artifacts import provenance, write_json

ITEMS, USERS, WIDTH, K, WINDOW = (10_000, 100_000, 1_000_000), (1, 32), 320, 10, 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS, TOKENS, MIB = 5, 100, 1024**2
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """The median CPU time, after a first run that warms up."""
    run()
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        spent.append(1000 * (time.process_time() - start))
    return statistics.median(spent)


def best(scores: np.ndarray) -> np.ndarray:
    """The best ten of each user as rsllm takes them."""
    return np.stack([top(row, K) for row in scores])


def all_sorted(scores: np.ndarray) -> np.ndarray:
    """The same of all scores, sorted."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :K]


def search(num_items: int, num_users: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a user, and what the tables and scores take."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(num_items, WIDTH, generator=generator))
    users = torch.nn.functional.normalize(torch.randn(num_users, WIDTH, generator=generator))
    found: dict[str, Any] = {"items": num_items, "users": num_users}
    parts = [users.double() @ part.double().T for part in keys.split(100_000)]
    exact = all_sorted(torch.cat(parts, 1).numpy())
    for name, dtype in DTYPES.items():
        own, asked = keys.to(dtype), users.to(dtype)
        scores = (asked @ own.T).double().numpy()
        found[f"{name}: product"] = (
            milliseconds(lambda own=own, asked=asked: asked @ own.T, rounds) / num_users
        )
        found[f"{name}: keys, MiB"] = own.numel() * own.itemsize / MIB
        shared = [len({*a} & {*b}) / K for a, b in zip(best(scores), exact, strict=True)]
        found[f"{name}: of the best ten"] = statistics.mean(shared)
        if name == "fp32":
            assert np.array_equal(best(scores), all_sorted(scores)), "the same items in order"
            found["best ten"] = milliseconds(lambda scores=scores: best(scores), rounds) / num_users
            found["all sorted"] = (
                milliseconds(lambda scores=scores: all_sorted(scores), rounds) / num_users
            )
            found["scores, MiB"] = scores.nbytes / MIB
    ranker = made_up_ranker(lambda rows: (users[: len(rows)] @ keys.T).double().numpy(), num_items)
    pasts = [np.arange(100, dtype=np.int32)] * num_users
    found["Ranker.lists"] = milliseconds(lambda: ranker.lists(pasts, K), rounds) / num_users
    return found


def made_up_ranker(score: Callable[[Any], np.ndarray], num_items: int) -> Ranker:
    """A recommender of so many items, each with a title of its own."""
    number = np.arange(num_items)
    catalogue = Catalogue(number, number.astype(np.int32), np.ones(num_items, np.int64))
    names, facts = [str(n) for n in number], {"inputs": {"config": {"window": WINDOW}}}
    data = PreparedData(Path(), names, names, catalogue, facts)
    return Ranker("made up", data, np.zeros((0, 0)), recommender=score, language=None)


@torch.inference_mode()
def language_model(num_users: int, rounds: int) -> float:
    """Milliseconds a user of a pass over histories, in fp32."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(SHAPE["vocab_size"], (num_users, TOKENS))
    return milliseconds(lambda: model(ids, use_cache=False), rounds) / num_users


def main() -> None:
    """Measure; print and write times, memory and the number at which an index would pay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(items, users) for items in arguments.items for users in USERS]
    found = [search(items, users, arguments.rounds) for items, users in sizes]
    spent = language_model(4, arguments.rounds)
    most = max(arguments.items)
    equal = {
        str(row["users"]): round(most * spent / row["Ranker.lists"])
        for row in found
        if row["items"] == most
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "searches": found,
        "milliseconds": "of CPU time a user",
        "threads": torch.get_num_threads(),
        "language_model": {"milliseconds": spent, "tokens": TOKENS, "shape": SHAPE},
        "items_at_which_both_take_as_long_by_users": equal,
        "largest_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "width": WIDTH,
        "k": K,
        "rounds": arguments.rounds,
        "provenance": provenance(),
    }
    write_json(arguments.out, result)
    print(tabulate(found, headers="keys", floatfmt=".3g"))
    print(f"a pass over {TOKENS} tokens: {spent:.0f} ms; so long takes a search of {equal} items")


if __name__ == "__main__":
    run_script(main)
