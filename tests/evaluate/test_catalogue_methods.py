"""Methods that rank all items by a history, from their artifact to their metrics."""

# Axes: R rows, I items, D language-model width, K key width.
from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model.small_models import stir
from safetensors.numpy import load_file
from small_data import NUM_CANDIDATES, TITLES, WINDOW, small_data

from rsllm.config import Experiment
from rsllm.config.plain import content_hash, replace_in
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.errors import CheckpointError
from rsllm.evaluate.metrics import rank_metrics
from rsllm.evaluate.rank import candidate_sets
from rsllm.evaluate.run import Method, _evaluate, _inputs, _language_scores, _read
from rsllm.model import tuned
from rsllm.model.catalogue import ItemKeys
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import Store

CHANGES = {
    "data.window": WINDOW,
    "backbone.lora_rank": 2,
    "projector.hidden": 8,
    "catalogue.recency": 0.5,
    "catalogue.user_state": "mean",
    "catalogue.temperature": 0.2,
    "evaluation.batch_size": 4,
}
EXPERIMENT = replace_in(Experiment(), CHANGES)
ITEMS = ItemEmbeddings(
    torch.randn(len(TITLES), 8, generator=torch.Generator().manual_seed(0)), "made up"
)
TITLES_IF = torch.randn(len(TITLES), 6, generator=torch.Generator().manual_seed(1))
LAYOUT: Any = SimpleNamespace(threads=0, precision="fp32", use_gpu=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small", num_draws=2)


@pytest.fixture(scope="module")
def made(
    data: PreparedData, random_llm: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Method, tuned.LanguageModel]:
    """A tuned method whose every weight is away from its start, and its model."""
    folder = tmp_path_factory.mktemp("tuned")
    model = tuned.build(
        EXPERIMENT,
        "unified",
        random_llm,
        data,
        ITEMS,
        dtype=torch.float32,
        form="history",
        titles_IF=TITLES_IF,
    )
    stir(model.hybrid, 0.05)
    weights = {n: p.detach() for n, p in model.hybrid.named_parameters() if p.requires_grad}
    tuned.save(model, weights, folder)
    method = Method(
        name="m",
        scorer="catalogue",
        experiment=EXPERIMENT,
        representation="unified",
        prompts="history",
        artifact=str(folder),
    )
    return method, model


def unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / np.linalg.norm(vector))


@torch.no_grad()
def naive_scores(
    artifact: Path, rows: Rows, data: PreparedData, model: tuned.LanguageModel | None
) -> np.ndarray:
    """One history after another, from the weights and keys in the file; without a model by keys."""
    stored = {n: a.astype(np.float64) for n, a in load_file(artifact / tuned.CATALOGUE).items()}
    keys_IK, prefix = stored[tuned.KEYS], "keys." if model else ""
    scale = math.exp(10 * stored[f"{prefix}score.gain.log"][0]) / 0.2
    popular_I = 10 * stored[f"{prefix}score.popularity"][0] * np.log1p(data.catalogue.counts_I)
    found = []
    for row in range(len(rows)):
        history = rows.histories(row).tolist()
        ages = enumerate(reversed(history))
        vector_K = unit(np.sum([0.5**age * keys_IK[item] for age, item in ages], axis=0))
        if model:
            prompt = model.encoder.history(history, 0)
            ids, items = torch.tensor([prompt.tokens.ids]), torch.tensor([prompt.tokens.items])
            decoder = model.hybrid.eval().backbone.get_decoder()
            out = decoder(inputs_embeds=model.hybrid.embed(ids, items), use_cache=False)
            states_TD = out.last_hidden_state[0, prompt.starts[0] : prompt.ends[-1] + 1]
            state_D = states_TD.double().mean(0).numpy()
            state_D = state_D / np.sqrt((state_D**2).mean())
            gain = 0.1 * math.exp(10 * stored["state_gain.log"][0])
            vector_K = unit(gain * (stored["state_map.weight"] @ state_D) + vector_K)
        found.append(scale * (keys_IK @ vector_K) + popular_I)
    return np.stack(found)


def enumerated(
    scores_RI: np.ndarray, rows: Rows, data: PreparedData
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Metrics as means over all candidate sets that could be drawn, and over the catalogue."""
    expected, whole, titles = [], [], data.catalogue.title_keys_I
    for row, target in enumerate(rows.target_R.tolist()):
        known = {titles[item] for item in [*rows.histories(row).tolist(), target]}
        pool = [item for item in data.catalogue.representatives if titles[item] not in known]
        ahead = [bool(scores_RI[row, item] >= scores_RI[row, target]) for item in pool]
        ranks = np.array([1 + sum(own) for own in combinations(ahead, NUM_CANDIDATES - 1)])
        expected.append({name: values.mean() for name, values in rank_metrics(ranks).items()})
        whole.append(rank_metrics(np.array([1 + sum(ahead)])))
    return (
        {name: np.array([row[name] for row in expected]) for name in expected[0]},
        {name: np.array([row[name][0] for row in whole]) for name in whole[0]},
    )


def evaluated(method: Method, data: PreparedData, backbone: str, folder: Path) -> Any:
    store, key = Store.open(folder / "store"), {"of": method.name}
    here = folder / "store" / "data" / "small"
    shutil.copytree(data.path, here)

    def make(artifact: Path) -> None:
        shutil.copytree(method.artifact, artifact, dirs_exist_ok=True)

    method = replace(method, artifact=str(store.get("stage-2", key, make)))
    _evaluate(method, "test", here, backbone, LAYOUT, store, key)
    return _read(method, store.path("evaluation", key))


@pytest.mark.parametrize("kind", ["catalogue", "keys"])
def test_metrics_equal_a_naive_enumeration(
    made: tuple[Method, tuned.LanguageModel],
    data: PreparedData,
    random_llm: Path,
    kind: str,
    tmp_path: Path,
) -> None:
    method, model = made
    artifact, rows = Path(method.artifact), data.rows("test")
    if kind == "keys":
        artifact = tmp_path / "keys"
        artifact.mkdir()
        keys = ItemKeys(ITEMS.standardised(), TITLES_IF, data.catalogue, EXPERIMENT.catalogue)
        stir(keys, 0.05)
        weights = {name: p.detach() for name, p in keys.named_parameters()}
        tuned.save_catalogue(keys, weights, TITLES_IF, artifact)
        ITEMS.save(artifact)
        method = Method(name="k", scorer="keys", experiment=EXPERIMENT, artifact=str(artifact))
        assert not method.is_language_model
    outcome = evaluated(method, data, str(random_llm), tmp_path)
    scores_RI = naive_scores(artifact, rows, data, model if kind == "catalogue" else None)
    for draw in range(2):
        sets_RC = candidate_sets(data.rows("test", draw)).astype(np.int64)
        expected_RC = np.take_along_axis(scores_RI, sets_RC, axis=1)
        np.testing.assert_allclose(outcome.scores_DRC[draw], expected_RC, atol=1e-3)
    expected, whole = enumerated(scores_RI, rows, data)
    assert outcome.expected.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(outcome.expected[name], expected[name], atol=1e-9, err_msg=name)
        np.testing.assert_allclose(outcome.catalogue[name], whole[name], atol=1e-9, err_msg=name)
    assert outcome.answers is None
    assert outcome.likelihood_DRC is outcome.per_token_DRC is None


def test_the_batch_size_does_not_matter(
    made: tuple[Method, tuned.LanguageModel], data: PreparedData, random_llm: Path
) -> None:
    method, _ = made
    rows, found = [data.rows("test")], []
    for size in (1, 3, 99):
        experiment = replace_in(EXPERIMENT, {"evaluation.batch_size": size})
        sized = replace(method, experiment=experiment)
        scores, answers = _language_scores(sized, data, rows, str(random_llm), LAYOUT)
        assert answers is None
        found.append(scores["scores"][0])
    assert np.ptp(found[0], axis=1).min() > 1e-2
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4, rtol=0)


def test_titles_are_ranked_by_likelihood_behind_a_history_prompt(
    made: tuple[Method, tuned.LanguageModel], data: PreparedData, random_llm: Path
) -> None:
    """What a stage without beta is ranked by: whoever the other candidates are, a score stays."""
    rows = data.rows("test")
    settings = {"evaluation.generation_rows": -1}
    method = replace(made[0], scorer="likelihood", experiment=replace_in(EXPERIMENT, settings))
    (first, _), (second, _) = (
        _language_scores(method, data, [own], str(random_llm), LAYOUT)
        for own in (rows, replace(rows, candidates_RC=candidate_sets(rows)[:, ::-1]))
    )
    assert np.ptp(first["scores"][0], axis=1).min() > 1e-2
    np.testing.assert_allclose(first["scores"][0], second["scores"][0][:, ::-1], atol=1e-4)


def test_it_writes_behind_a_history_prompt(
    made: tuple[Method, tuned.LanguageModel], data: PreparedData, random_llm: Path, tmp_path: Path
) -> None:
    """What is written along the candidates is scored; what is written otherwise stands beside."""
    settings = {"evaluation.decoding": ["constrained", "catalogue"], "evaluation.max_new_tokens": 4}
    method = replace(made[0], scorer="written", experiment=replace_in(EXPERIMENT, settings))
    outcome = evaluated(method, data, str(random_llm), tmp_path)
    assert outcome.likelihood_DRC is outcome.per_token_DRC is None
    assert outcome.answers is not None
    for row, answer in enumerate(outcome.answers["constrained"]):
        candidates = candidate_sets(data.rows("test"))[row]
        found = [data.titles[item] == answer for item in candidates]
        assert outcome.scores_DRC[0, row].tolist() == found
        assert sum(found) == 1
    for row, answer in enumerate(outcome.answers["catalogue"]):
        seen = {data.titles[item] for item in data.rows("test").histories(row)}
        assert answer in set(data.titles) - seen


def test_forms_and_scorers_have_keys_of_their_own(
    made: tuple[Method, tuned.LanguageModel], tmp_path: Path
) -> None:
    method, _ = made
    asked = [method, replace(method, prompts="choice"), replace(method, scorer="likelihood")]
    keys = {content_hash(_inputs(own, "test", tmp_path, "backbone", LAYOUT)) for own in asked}
    assert len(keys) == 3
    assert method.is_language_model


def test_an_artifact_without_a_scorer_is_refused(
    made: tuple[Method, tuned.LanguageModel],
    data: PreparedData,
    random_llm: Path,
    tmp_path: Path,
) -> None:
    method, rows = made[0], [data.rows("test")]
    folder = tmp_path / "tuned"
    shutil.copytree(method.artifact, folder)
    (folder / tuned.CATALOGUE).unlink()
    with pytest.raises(CheckpointError, match=r"catalogue\.safetensors is missing or damaged"):
        _language_scores(replace(method, artifact=str(folder)), data, rows, str(random_llm), LAYOUT)
    shutil.copytree(method.artifact, folder, dirs_exist_ok=True)
    smaller = replace(
        data,
        titles=data.titles[:-1],
        catalogue=replace(data.catalogue, counts_I=data.catalogue.counts_I[:-1]),
    )
    with pytest.raises(CheckpointError, match=r"24 titles .* catalogue of 23; prepare the data"):
        _language_scores(
            replace(method, artifact=str(folder)), smaller, rows, str(random_llm), LAYOUT
        )
