"""Evaluate methods on held-out rows, each in its own Ray task, once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rsllm.config import Experiment, Representation, Scorer
from rsllm.plan import Layout
from rsllm.runs import Store, read_json, write_json
from rsllm.settings import to_dict

SCORES, ANSWERS = "scores.safetensors", "answers.json"
EXPECTED = "expected/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Something that ranks candidates: a recommender or a (tuned) language model."""

    name: str
    scorer: Scorer | Literal["recommender"]
    experiment: Experiment
    representation: Representation = "text"
    artifact: str = ""
    """Folder of the tuned model or the recommender; empty leaves the backbone untuned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a method did on the rows of a split."""

    method: Method
    scores_DRC: np.ndarray
    """Of every draw of the candidates."""
    likelihood_DRC: np.ndarray | None
    """Title log-probabilities beside another scorer's scores."""
    expected: dict[str, np.ndarray]
    """A recommender's exact expectations over uniform candidate draws, per row."""
    answers: list[str] | None
    """Greedy answers to the first rows of a fixed sample."""
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
    """Score (and let answer) every method on the same rows; what is in the store is not redone.

    This is the one function that opens the test split; it says so.
    """
    import ray

    print(f"opening the {split} split for {', '.join(m.name for m in methods)}", flush=True)
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
        "backbone": fingerprint if method.scorer != "recommender" else "",
        "artifact": Path(method.artifact).name,
        "representation": method.representation,
        "scorer": method.scorer,
        "prompt": to_dict(method.experiment.prompt),
        "evaluation": to_dict(method.experiment.evaluation),
        "precision": layout.precision,
    }


def _read(method: Method, folder: Path) -> Outcome:
    from safetensors.numpy import load_file

    scores = load_file(folder / SCORES)
    answers = read_json(folder / ANSWERS)
    return Outcome(
        method=method,
        scores_DRC=scores["scores"],
        likelihood_DRC=scores.get("likelihood"),
        expected={
            name.removeprefix(EXPECTED): values
            for name, values in scores.items()
            if name.startswith(EXPECTED)
        },
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
    from rsllm.evaluate.rank import held_out

    data = PreparedData.open(data_folder)
    config = method.experiment.evaluation
    limit = config.test_rows if split == "test" else config.validation_rows
    draws = held_out(data, split, limit)

    def make(folder: Path) -> None:
        from safetensors.numpy import save_file

        start = time.monotonic()
        if method.scorer == "recommender":
            scores, answers = _recommender_scores(method, data, draws), None
        else:
            scores, answers = _language_scores(method, data, draws, backbone, layout)
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


def _recommender_scores(method: Method, data: Any, draws: Any) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    from rsllm import recommenders
    from rsllm.evaluate.rank import candidate_scores, catalogue_scores, expected_over_draws

    experiment = method.experiment
    model = recommenders.build(experiment.recommender, len(data.titles), experiment.data.window)
    model.load_state_dict(load_file(Path(method.artifact) / "recommender.safetensors"))
    scores_RI = catalogue_scores(model, draws[0])
    chosen = np.stack([candidate_scores(scores_RI, rows) for rows in draws])
    expected = expected_over_draws(scores_RI, draws[0], data)
    return {"scores": chosen} | {EXPECTED + name: values for name, values in expected.items()}


def _language_scores(
    method: Method, data: Any, draws: Any, backbone: str, layout: Layout
) -> tuple[dict[str, np.ndarray], list[str] | None]:
    import torch

    from rsllm.config import LossConfig
    from rsllm.evaluate.generate import greedy_answers
    from rsllm.evaluate.rank import fixed_sample, score_candidates
    from rsllm.model import tuned
    from rsllm.model.objective import LanguageObjective
    from rsllm.recommenders.embeddings import ItemEmbeddings

    if layout.threads:
        torch.set_num_threads(layout.threads)
    bf16, unified = layout.precision == "bf16", method.representation == "unified"
    model = tuned.build(
        method.experiment,
        method.representation,
        backbone,
        data,
        ItemEmbeddings.load(Path(method.artifact)) if unified else None,
        dtype=torch.bfloat16 if layout.use_gpu and bf16 else torch.float32,
        lora=bool(method.artifact),
    )
    if method.artifact:
        tuned.load(model, Path(method.artifact))
    autocast = bf16 and not layout.use_gpu
    objective = LanguageObjective(model.hybrid, LossConfig(), autocast=autocast)
    objective.to("cuda" if layout.use_gpu else "cpu")
    config = method.experiment.evaluation
    scorers: dict[str, Scorer] = {"likelihood": "likelihood"}
    if method.scorer == "pointer":
        scorers = {"scores": "pointer", **scorers}
    scores = {
        name: np.stack(
            [
                score_candidates(
                    objective, rows, model.encoder, data, scorer, batch_size=config.batch_size
                )
                for rows in draws
            ]
        )
        for name, scorer in scorers.items()
    }
    scores.setdefault("scores", scores["likelihood"])
    if config.generation_rows < 0:
        return scores, None
    answers = greedy_answers(
        objective,
        fixed_sample(draws[0], config.generation_rows),
        model.encoder,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    return scores, answers
