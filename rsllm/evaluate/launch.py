"""Evaluate methods on held-out rows, each in its own Ray task, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError

from rsllm.config import SLOTTED, Decoding, Experiment, Representation, Scorer
from rsllm.errors import CheckpointError
from rsllm.evaluate.rank import (
    CATALOGUE,
    EXPECTED,
    catalogue_scores,
    fixed_sample,
    held_out,
    named,
    rank_catalogue,
    reordered_scores,
    score_candidates,
)
from rsllm.plan import Layout
from rsllm.runs import Store, read_json, write_json
from rsllm.settings import replace_in, to_dict

SCORES, ANSWERS = "scores.safetensors", "answers.json"
SCORES_ONLY = {"evaluation.generation_rows": -1, "evaluation.candidate_orders": 0}
Rule = Literal["popularity", "markov", "item-knn", "order-rule", "title-similarity"]
"""What scores the whole catalogue beside a fitted recommender: `rsllm.recommenders.rules`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Something that ranks candidates: a recommender, a rule or a (tuned) language model."""

    name: str
    scorer: Scorer | Literal["recommender"] | Rule
    experiment: Experiment
    representation: Representation = "text"
    artifact: str = ""
    """Folder of the tuned model, the recommender or the title vectors; empty for the backbone
    untuned, and for rules."""

    @property
    def speaks(self) -> bool:
        """Whether it is a language model."""
        return self.scorer in get_args(Scorer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a method did on the rows of a split."""

    method: Method
    scores_DRC: np.ndarray
    """Of every draw of the candidates."""
    likelihood_DRC: np.ndarray | None
    """Title log-probabilities beside another scorer's scores."""
    per_token_DRC: np.ndarray | None
    """Of language models: title log-probabilities, means over their tokens."""
    expected: dict[str, np.ndarray]
    """Of what scores the catalogue: exact expectations over uniform candidate draws, per row."""
    catalogue: dict[str, np.ndarray]
    """And the metrics among all titles that could be candidates."""
    orders_PRC: np.ndarray | None
    """Of the first draw again, under each random order of the candidates."""
    answers: dict[Decoding, list[str]] | None
    """Greedy answers to a fixed sample of the rows, by how they were decoded."""
    seconds: float


def evaluate(
    methods: Sequence[Method],
    split: Literal["validation", "test"],
    *,
    data: Path,
    backbone: str,
    fingerprint: str,
    layout: Layout,
    store: Store,
) -> list[Outcome]:
    """Score every method on the same rows; what is in the store is not redone.

    On test rows language models also answer, and rank other orders of the candidates. This
    is the one function that opens the test split; it says so.
    """
    import ray

    print(f"opening the {split} split for {', '.join(m.name for m in methods)}", flush=True)
    if split == "validation":
        methods = [replace(m, experiment=replace_in(m.experiment, SCORES_ONLY)) for m in methods]
    work = ray.remote(_evaluate).options(
        num_cpus=layout.cpus_per_worker, num_gpus=1 if layout.use_gpu else 0, max_retries=1
    )
    pending: dict[str, Any] = {}
    keys = [_inputs(method, split, data, fingerprint, layout) for method in methods]
    for method, key in zip(methods, keys, strict=True):
        folder = store.path("evaluation", key)
        if not folder.exists() and str(folder) not in pending:
            _wait_below(layout.concurrent_trials, list(pending.values()))
            task = work.remote(method, split, data, backbone, layout, store, key)
            pending[str(folder)] = task
    ray.get(list(pending.values()))
    return [
        _read(method, store.path("evaluation", key))
        for method, key in zip(methods, keys, strict=True)
    ]


def _wait_below(limit: int, tasks: list[Any]) -> None:
    """Wait until fewer than `limit` tasks run: two on the same cores are slower than one by one."""
    import ray

    if len(tasks) >= limit:
        ray.wait(tasks, num_returns=len(tasks) - limit + 1)


def _inputs(
    method: Method, split: str, data: Path, fingerprint: str, layout: Layout
) -> dict[str, Any]:
    return {
        "split": split,
        "data": data.name,
        "backbone": fingerprint if method.speaks else "",
        "artifact": Path(method.artifact).name,
        "representation": method.representation,
        "scorer": method.scorer,
        "prompt": to_dict(method.experiment.prompt),
        "evaluation": to_dict(method.experiment.evaluation),
        "shuffle_items": method.experiment.projector.shuffle_items,
        "tuning": method.experiment.backbone.tuning,
        "precision": layout.precision,
    }


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """The scores of an evaluation in the store, by name.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from safetensors.numpy import load_file

    try:
        return load_file(folder / SCORES)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read scores from {folder}: {error}; delete it") from error


def _read(method: Method, folder: Path) -> Outcome:
    scores, answers = read_scores(folder), read_json(folder / ANSWERS)
    return Outcome(
        method=method,
        scores_DRC=scores["scores"],
        likelihood_DRC=scores.get("likelihood"),
        per_token_DRC=scores.get("per_token"),
        orders_PRC=scores.get("orders"),
        expected=named(scores, EXPECTED),
        catalogue=named(scores, CATALOGUE),
        answers=answers["answers"],
        seconds=answers["seconds"],
    )


def _evaluate(
    method: Method,
    split: Literal["validation", "test"],
    data_folder: Path,
    backbone: str,
    layout: Layout,
    store: Store,
    key: dict[str, Any],
) -> None:
    from rsllm.data.prepared import PreparedData

    data = PreparedData.open(data_folder)
    if layout.threads:
        torch.set_num_threads(layout.threads)
    config = method.experiment.evaluation
    limit = config.test_rows if split == "test" else config.validation_rows
    draws = held_out(data, split, limit)

    def make(folder: Path) -> None:
        from safetensors.numpy import save_file

        start = time.monotonic()
        if method.speaks:
            scores, answers = _language_scores(method, data, draws, backbone, layout)
        else:
            scores, answers = rank_catalogue(_catalogue_scorer(method, data), draws, data), None
        save_file(scores, folder / SCORES)
        write_json(
            folder / ANSWERS,
            {
                "name": method.name,
                "answers": answers,
                "seconds": round(time.monotonic() - start, 1),
            },
        )

    store.get("evaluation", key, make)


def _catalogue_scorer(method: Method, data: Any) -> Callable[[Any], np.ndarray]:
    from rsllm import recommenders
    from rsllm.recommenders.embeddings import ItemEmbeddings
    from rsllm.recommenders.rules import RULES, title_similarity

    folder, config = Path(method.artifact), method.experiment.recommender
    if method.scorer == "title-similarity":
        return title_similarity(ItemEmbeddings.load(folder).standardised().double().numpy())
    if method.scorer != "recommender":
        return RULES[method.scorer](data)
    model = recommenders.load(folder, config, len(data.titles), data.config["window"])
    if config.shuffle_history:
        return lambda rows: catalogue_scores(model, rows.shuffled(config.seed))
    return lambda rows: catalogue_scores(model, rows)


def _language_scores(
    method: Method, data: Any, draws: Any, backbone: str, layout: Layout
) -> tuple[dict[str, np.ndarray], dict[Decoding, list[str]] | None]:
    from rsllm.evaluate.generate import greedy_answers

    objective, encoder = _objective(method, data, backbone, layout)
    config = method.experiment.evaluation

    def score(rows: Any, scorer: Scorer) -> np.ndarray:
        return score_candidates(
            objective, rows, encoder, data, scorer, batch_size=config.batch_size
        )

    own: Scorer = "pointer" if method.scorer == "pointer" else "likelihood"
    scores = {"scores": np.stack([score(rows, own) for rows in draws])}
    if own == "pointer":
        scores["likelihood"] = np.stack([score(rows, "likelihood") for rows in draws])
    length_DRC = [[[encoder.answer_length(i) for i in c] for c in d.candidates_RC] for d in draws]
    scores["per_token"] = scores.get("likelihood", scores["scores"]) / np.array(length_DRC)
    if orders := config.candidate_orders:
        scores["orders"] = reordered_scores(lambda rows: score(rows, own), draws[0], orders)
    if config.generation_rows < 0:
        return scores, None
    return scores, {
        decoding: greedy_answers(
            objective,
            fixed_sample(draws[0], config.generation_rows),
            encoder,
            data.titles,
            decoding,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        for decoding in config.decoding
    }


def _objective(method: Method, data: Any, backbone: str, layout: Layout) -> tuple[Any, Any]:
    """The method's model on its device, and the encoder of its prompts."""
    from rsllm.config import LossConfig
    from rsllm.model import tuned
    from rsllm.model.objective import LanguageObjective
    from rsllm.recommenders.embeddings import ItemEmbeddings

    bf16, slotted = layout.precision == "bf16", method.representation in SLOTTED
    model = tuned.build(
        method.experiment,
        method.representation,
        backbone,
        data,
        ItemEmbeddings.load(Path(method.artifact)) if slotted else None,
        dtype=torch.bfloat16 if layout.use_gpu and bf16 else torch.float32,
        lora=bool(method.artifact),
    )
    if method.artifact:
        tuned.load(model, Path(method.artifact))
    objective = LanguageObjective(model.hybrid, LossConfig(), autocast=bf16 and not layout.use_gpu)
    return objective.to("cuda" if layout.use_gpu else "cpu"), model.encoder
