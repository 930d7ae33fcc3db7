"""Evaluate methods on held-out rows, each in its own Ray task, once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rsllm.assets.catalogue import backbone_here
from rsllm.compute.layout import Layout
from rsllm.config import SLOTTED, Decoding, Experiment, Form, LossConfig, Representation, Scorer
from rsllm.config.plain import replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.errors import CheckpointError
from rsllm.evaluate import rank
from rsllm.evaluate.deployed import pasts_of
from rsllm.evaluate.generate import greedy_answers, written_scores
from rsllm.evaluate.scorers import catalogue_scorer
from rsllm.model import tuned
from rsllm.model.history import HistoryObjective
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.encode import PromptEncoder
from rsllm.prompts.templates import wording
from rsllm.recommenders.embeddings import ItemEmbeddings, other_items
from rsllm.store.artifacts import Store, read_json, write_json

SCORES, ANSWERS = "scores.safetensors", "answers.json"
SCORES_ONLY = {"evaluation.generation_rows": -1, "evaluation.candidate_orders": 0}
SHUFFLE_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Something that ranks candidates: a recommender, a rule or a (tuned) language model."""

    name: str
    scorer: str
    """A `Scorer` of language models, or the name of a `CatalogueScorer`."""
    experiment: Experiment
    representation: Representation = "text"
    prompts: Form = "choice"
    artifact: str = ""
    """Folder of the tuned model, the recommender or the title vectors; empty for the
    backbone untuned, and for rules without vectors."""
    shuffle_titles: bool = False
    """Ablation: a language model reads, for every item, the title of another one, always the same;
    slots stay. It does not answer, for its answers would name other items."""
    mean_of_orders: int = 0
    """Of a language model: candidates' scores are means over so many random orders of them (as
    arXiv 2305.08845, 3.3 does with ranks); 0 takes the one order that the rows have."""

    @property
    def is_language_model(self) -> bool:
        """Whether it is a language model."""
        return self.scorer in get_args(Scorer)

    def under(self, settings: Mapping[str, Any]) -> Method:
        """The same, judged under other settings."""
        return replace(self, experiment=replace_in(self.experiment, settings))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a method did on the rows of a split."""

    method: Method
    scores_DRC: np.ndarray
    """Of every draw of the candidates."""
    seconds: float
    likelihood_DRC: np.ndarray | None = None
    """Title log-probabilities beside another scorer's scores."""
    per_token_DRC: np.ndarray | None = None
    """Of language models: title log-probabilities, means over their tokens."""
    expected: dict[str, np.ndarray] = field(default_factory=dict)
    """Of what scores the catalogue: exact expectations over uniform candidate draws, per row."""
    catalogue: dict[str, np.ndarray] = field(default_factory=dict)
    """And the metrics among all titles that could be candidates."""
    lists_RK: np.ndarray | None = None
    """And what it would recommend to each row's user (`rsllm.evaluate.deployed`)."""
    orders_PRC: np.ndarray | None = None
    """Of the first draw again, under each random order of the candidates."""
    answers: dict[Decoding, list[str]] | None = None
    """Greedy answers to a fixed sample of the rows, by how they were decoded."""
    name: str = ""
    """The evaluation's, in the store."""


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
        methods = [method.under(SCORES_ONLY) for method in methods]
    gpus = 1 if layout.use_gpu else 0
    work = ray.remote(num_cpus=layout.cpus_per_worker, num_gpus=gpus, max_retries=1)(_evaluate)
    keys = [_inputs(method, split, data, fingerprint, layout) for method in methods]
    folders = [store.path("evaluation", key) for key in keys]
    tasks: dict[Path, Any] = {}
    for method, key, folder in zip(methods, keys, folders, strict=True):
        if folder in tasks or store.holds(folder):
            continue
        if len(tasks) >= layout.concurrent_trials:  # more on the same cores would be slower
            ray.wait(list(tasks.values()), num_returns=len(tasks) - layout.concurrent_trials + 1)
        named = work.options(name=f"{method.name} on {split}")
        tasks[folder] = named.remote(method, split, data, backbone, layout, store, key)
    ray.get(list(tasks.values()))
    found = map(store.local, folders)
    return [_read(method, folder) for method, folder in zip(methods, found, strict=True)]


def _inputs(
    method: Method, split: str, data: Path, fingerprint: str, layout: Layout
) -> dict[str, Any]:
    return {
        "split": split,
        "data": data.name,
        "backbone": fingerprint if method.is_language_model else "",
        "artifact": Path(method.artifact).name,
        "representation": method.representation,
        "prompts": method.prompts,
        "scorer": method.scorer,
        "prompt": to_dict(method.experiment.prompt),
        "wording": wording() if method.is_language_model else "",
        "evaluation": to_dict(method.experiment.evaluation),
        "shuffle_items": method.experiment.projector.shuffle_items,
        "tuning": method.experiment.backbone.tuning,
        "layers": method.experiment.backbone.layers if method.is_language_model else 0,
        "precision": layout.precision,
        **{n: value for n in ("shuffle_titles", "mean_of_orders") if (value := getattr(method, n))},
    }


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """The scores of an evaluation in the store, by name.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(folder / SCORES)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read scores from {folder}: {error}; delete it") from error


def _read(method: Method, folder: Path) -> Outcome:
    scores, answers = read_scores(folder), read_json(folder / ANSWERS)
    return Outcome(
        method=method,
        scores_DRC=scores["scores"],
        seconds=answers["seconds"],
        likelihood_DRC=scores.get("likelihood"),
        per_token_DRC=scores.get("per_token"),
        orders_PRC=scores.get("orders"),
        expected=rank.named(scores, rank.EXPECTED),
        catalogue=rank.named(scores, rank.CATALOGUE),
        lists_RK=scores.get("lists"),
        answers=answers["answers"],
        name=folder.name,
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
    data = PreparedData.open(store.local(data_folder))
    if method.artifact:
        method = replace(method, artifact=str(store.local(method.artifact)))
    if layout.threads:
        torch.set_num_threads(layout.threads)
    config = method.experiment.evaluation
    limit = config.test_rows if split == "test" else config.validation_rows
    draws = rank.held_out(data, split, limit)
    if config.shuffle_history:
        draws = [rows.shuffled(SHUFFLE_SEED) for rows in draws]

    def make(folder: Path) -> None:
        start, answers = time.monotonic(), None
        if method.is_language_model:
            scores, answers = _language_scores(method, data, draws, backbone, layout)
        else:
            score_all = catalogue_scorer(method.scorer).make(method, data)
            scores = rank.rank_catalogue(score_all, draws, data, pasts_of(draws[0], data))
        # It writes memory as it lies, whatever the strides say.
        save_file({n: np.ascontiguousarray(a) for n, a in scores.items()}, folder / SCORES)
        seconds = round(time.monotonic() - start, 1)
        write_json(folder / ANSWERS, {"name": method.name, "answers": answers, "seconds": seconds})

    store.get("evaluation", key, make)


def _language_scores(
    method: Method, data: PreparedData, draws: Sequence[Rows], backbone: str, layout: Layout
) -> tuple[dict[str, np.ndarray], dict[Decoding, list[str]] | None]:
    if method.shuffle_titles:
        others = other_items(len(data.titles)).tolist()
        data = replace(data, titles=[data.titles[item] for item in others])
    objective, encoder = load_objective(method, data, backbone, layout)
    config = method.experiment.evaluation
    if isinstance(objective, HistoryObjective):
        size = config.batch_size
        score_all = partial(rank.score_catalogue, objective, encoder=encoder, batch_size=size)
        return rank.rank_catalogue(score_all, draws, data, pasts_of(draws[0], data)), None

    own: Any = method.scorer
    limits = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}

    def answers(rows: Rows, decoding: Decoding) -> list[str]:
        return greedy_answers(objective, rows, encoder, data, decoding, **limits)

    def score(rows: Rows, scorer: Scorer = own) -> np.ndarray:
        if scorer == "written":
            return written_scores(answers(rows, config.decoding[0]), rows, data.titles)
        size = config.batch_size
        return rank.score_candidates(objective, rows, encoder, data, scorer, batch_size=size)

    def ranked(rows: Rows) -> np.ndarray:
        orders = method.mean_of_orders
        return rank.reordered_scores(score, rows, orders).mean(axis=0) if orders else score(rows)

    scores = {"scores": np.stack([ranked(rows) for rows in draws])}
    if own == "pointer":
        scores["likelihood"] = np.stack([score(rows, "likelihood") for rows in draws])
    if own != "written":
        length_I = np.array([encoder.answer_length(item) for item in range(len(data.titles))])
        length_DRC = length_I[np.stack([rank.candidate_sets(rows) for rows in draws])]
        scores["per_token"] = scores.get("likelihood", scores["scores"]) / length_DRC
    if orders := config.candidate_orders:
        scores["orders"] = rank.reordered_scores(score, draws[0], orders)
    if config.generation_rows < 0 or method.shuffle_titles:
        return scores, None
    answered = rank.fixed_sample(draws[0], config.generation_rows)
    return scores, {decoding: answers(answered, decoding) for decoding in config.decoding}


def load_objective(
    method: Method, data: PreparedData, backbone: str, layout: Layout
) -> tuple[LanguageObjective | HistoryObjective, PromptEncoder]:
    """The method's model on its device, and the encoder of its prompts."""
    bf16, slotted = layout.precision == "bf16", method.representation in SLOTTED
    catalogue = method.scorer == "catalogue"
    model = tuned.build(
        method.experiment,
        method.representation,
        backbone_here(backbone, method.experiment.backbone.source),
        data,
        ItemEmbeddings.load(Path(method.artifact)) if slotted else None,
        dtype=torch.bfloat16 if layout.use_gpu and bf16 else torch.float32,
        form=method.prompts,
        titles_IF=tuned.title_vectors(Path(method.artifact)) if catalogue else None,
        lora=bool(method.artifact),
    )
    if method.artifact:
        tuned.load(model, Path(method.artifact))
    kind = HistoryObjective if catalogue else LanguageObjective
    objective = kind(model.hybrid, LossConfig(), autocast=bf16 and not layout.use_gpu)
    return objective.to("cuda" if layout.use_gpu else "cpu"), model.encoder
