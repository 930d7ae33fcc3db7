"""Several data sets in stage 1: whose turn it is, what a batch holds, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_data import NUM_CANDIDATES, small_data
from small_tasks import history_task, language_task, recommender_task
from world import run_in_world

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.data.prepared import COUNTS, PreparedData
from rsllm.errors import ConfigError
from rsllm.pipeline import Pipeline, StageInputs
from rsllm.prompts.collate import Batch
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import commit_dir
from rsllm.train.batches import POOL_STEPS, mixed_step, step_rows
from rsllm.train.stages import LanguageTask

WEIGHT = 0.5
STEPS = 50
TURNS = {"movie": 2 * POOL_STEPS, "game": POOL_STEPS}
"""Steps of four rows that are whole pools: rows are parted by length within one."""


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [1.0, 0.1], [1.0, 0.3, 2.0, 0.7]])
def test_turns_follow_the_weights_and_count_up(weights: list[float]) -> None:
    turns = [mixed_step(7, step, weights) for step in range(1500)]
    taken = [0] * len(weights)
    for step, (number, own_step) in enumerate(turns):
        assert own_step == taken[number]
        taken[number] += 1
        shares = [(step + 1) * weight / sum(weights) for weight in weights]
        assert max(abs(n - s) for n, s in zip(taken, shares, strict=True)) < 4
    if len(weights) > 1:
        assert [mixed_step(8, step, weights) for step in range(1500)] != turns


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("games") / "small"
    return small_data(folder, num_train=10, num_held_out=2, domain="game")


def mixed_task(
    data: PreparedData, other: PreparedData, backbone: Path, **overrides: Any
) -> LanguageTask:
    mixture = [(other, WEIGHT)]
    return language_task(data, backbone, name="stage1", mixture=mixture, **overrides)


Seen = list[tuple[str, int, int, tuple[int, ...]]]


def seen(task: LanguageTask, batch: Batch) -> Seen:
    """Domain by its wording, user, title of the target, and all ids of each row."""
    rows = []
    for row, ids in enumerate(batch.ids_BT):
        own = tuple(ids[batch.branch_BT[row] == 0].tolist())
        text = task.model.encoder.tokenizer.decode(own)
        (domain,) = (name for name in ("movie", "game") if name in text)
        rows.append((domain, int(batch.user_B[row]), int(batch.title_B[row]), own))
    return rows


def test_a_batch_is_of_one_domain_and_each_domain_has_its_epochs(
    data: PreparedData, games: PreparedData, random_llm: Path
) -> None:
    task = mixed_task(data, games, random_llm, samples=4 * STEPS)
    visits: dict[str, Counter[tuple[int, int]]] = {"movie": Counter(), "game": Counter()}
    for step in range(STEPS):
        rows = [row for batch in task.batches(step) for row in seen(task, batch)]
        assert len(rows) == 4
        number, own_step = mixed_step(task.seed, step, [1.0, WEIGHT])
        (domain,) = {domain for domain, *_ in rows}
        assert domain == ("movie", "game")[number]
        if own_step < TURNS[domain]:
            visits[domain].update((user, title) for _, user, title, _ in rows)
    for domain, prepared in (("movie", data), ("game", games)):
        rows = prepared.rows("train")
        titles = prepared.catalogue.title_keys_I[rows.target_R].tolist()
        pairs = list(zip(rows.user_R.tolist(), titles, strict=True))
        due = [step_rows(task.seed, own_step, 4, len(rows)) for own_step in range(TURNS[domain])]
        assert visits[domain] == Counter(pairs[row] for step in due for _, row in step)


def test_each_data_set_has_its_own_number_of_candidates(
    data: PreparedData, games: PreparedData, random_llm: Path
) -> None:
    config = {**games.config, "num_candidates": 3}
    other = replace(games, facts={**games.facts, "inputs": {"config": config}})
    task = mixed_task(data, other, random_llm)
    sizes = {seen(task, b)[0][0]: b.choice_BK.shape[1] for s in range(6) for b in task.batches(s)}
    assert sizes == {"movie": NUM_CANDIDATES, "game": 3}


def what_a_worker_sees(data: Path, other: Path, backbone: Path, steps: list[int]) -> Any:
    parts = dist.get_world_size()
    films, games = PreparedData.open(data), PreparedData.open(other)
    task = mixed_task(films, games, backbone, accumulation=2 // parts)
    return {s: [row for batch in task.batches(s) for row in seen(task, batch)] for s in steps}


def test_resumed_or_shared_the_rows_are_the_same(
    data: PreparedData, games: PreparedData, random_llm: Path
) -> None:
    steps = list(range(6))
    alone = what_a_worker_sees(data.path, games.path, random_llm, steps)
    assert {rows[0][0] for rows in alone.values()} == {"movie", "game"}
    resumed = what_a_worker_sees(data.path, games.path, random_llm, steps[::-1])
    assert resumed == alone
    workers = run_in_world(what_a_worker_sees, 2, data.path, games.path, random_llm, steps)
    for step in steps:
        shared = Counter(row for worker in workers for row in worker[step])
        assert shared == Counter(alone[step])


def test_validation_is_on_the_target_domain(
    data: PreparedData, games: PreparedData, random_llm: Path
) -> None:
    mixed = mixed_task(data, games, random_llm)
    plain = language_task(data, random_llm, name="stage1")
    found, expected = mixed.validate(mixed.objective), plain.validate(plain.objective)
    assert found.pop("prompts/cut_titles") == 2 * expected.pop("prompts/cut_titles")
    assert found == expected


def test_history_prompts_of_other_data_teach_names_alone(
    data: PreparedData, games: PreparedData, random_llm: Path
) -> None:
    losses = {"loss.alpha": 0.0, "loss.beta": 0.0}
    task = history_task(
        data, random_llm, name="stage1", mixture=[(games, WEIGHT)], samples=24, **losses
    )
    films, others = (part.encoder.history([1], 0).tokens.ids[:6] for part in task.batches.sets)
    assert films != others, "each in the words of its domain"
    for step in range(6):
        (batch,) = task.batches(step)
        number, _ = mixed_step(task.seed, step, [1.0, WEIGHT])
        own = task.batches.sets[number].encoder
        for row, past in enumerate(batch.asked.past_BM.tolist()):
            history, ids = [item for item in past if item >= 0], batch.ids_BT[row]
            prompts = [own.history(history, template).tokens.ids for template in range(3)]
            assert ids[batch.real_BT[row]].tolist() in prompts
        loss, parts = task.objective(batch)
        assert set(parts) == {"loss", "loss/next_item"}
        assert torch.isfinite(loss)


def pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch, **sources: tuple[str, str]) -> Pipeline:
    """The first source is the target; each has a family and the hash of its raw file."""
    target, *others = sources
    mixture = [{"data": {"source": source}, "weight": 2.0} for source in others]
    experiment = replace_in(Experiment(), {"data.source": target, "mixture": mixture})

    def prepare(self: Pipeline, config: Any) -> Path:
        family, raw = sources[config.source]
        path = folder / "data" / config.source
        hashes = {"interactions": {config.source: raw}, "items": {}}
        with commit_dir(path, inputs={"raw": hashes}) as staging:
            (staging / COUNTS).write_text(json.dumps({"family": family}))
        return path

    monkeypatch.setattr(Pipeline, "_prepare", prepare)
    monkeypatch.setattr(Pipeline, "check", lambda self: None)
    monkeypatch.setattr(
        Pipeline,
        "_language_model",
        lambda self, stage: StageInputs({}, {"data": str(self.prepare())}),
    )
    monkeypatch.setattr(Pipeline, "_train", lambda self, stage, inputs: inputs.folders | inputs.key)
    made = Pipeline(experiment, folder)
    vars(made)["backbone"] = "some/llm"
    return made


def test_stage_1_is_keyed_by_the_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"films": ("movielens", "a"), "games": ("", "b"), "songs": ("", "c")}
    made: Any = pipeline(tmp_path, monkeypatch, **sets).train_text()
    path = tmp_path / "data"
    assert made["mixture"] == [["games", 2.0], ["songs", 2.0]]
    assert made["data"] == str(path / "films")


@pytest.mark.parametrize(
    ("first", "second"),
    [(("movielens", "a"), ("movielens", "b")), (("", "a"), ("", "a"))],
    ids=["editions", "raw files"],
)
def test_data_sets_with_the_same_users_are_not_mixed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: tuple[str, str],
    second: tuple[str, str],
) -> None:
    sets = {"films": first, "games": ("", "z"), "more": second}
    with pytest.raises(ConfigError, match="films and more have the same users"):
        pipeline(tmp_path, monkeypatch, **sets).train_text()


@pytest.mark.parametrize("settings", [{"samples": 0}, {"representation": "unified"}])
def test_a_mixture_needs_a_stage_1_of_text(settings: dict[str, Any]) -> None:
    overrides = {f"stage1.{name}": value for name, value in settings.items()}
    with pytest.raises(ConfigError, match="mixture needs stage1"):
        replace_in(Experiment(), {"mixture": [{"data": {}}], **overrides})


def test_no_recommender_is_fitted_on_further_data() -> None:
    part = {"data": {"source": "games", "candidates": "recommender"}}
    message = "of games in the mixture is recommender.*choose uniform or popularity"
    with pytest.raises(ConfigError, match=message):
        replace_in(Experiment(), {"mixture": [part]})


@pytest.mark.parametrize("overrides", [{"data.candidates": "full"}, {"mixture": "full"}])
def test_no_prompt_holds_all_titles(tmp_path: Path, overrides: dict[str, Any]) -> None:
    if "mixture" in overrides:
        overrides = {"mixture": [{"data": {"source": "synthetic", "candidates": "full"}}]}
    experiment = replace_in(Experiment(), {"data.source": "synthetic", **overrides})
    with pytest.raises(ConfigError, match=r"data\.candidates of synthetic is full"):
        Pipeline(experiment, tmp_path).check()


def test_items_that_never_trained_leave_their_slots_empty(tmp_path: Path) -> None:
    data = small_data(tmp_path / "cold", num_train=1)
    cold_I = data.catalogue.counts_I == 0
    assert 0 < cold_I.sum() < len(cold_I)
    task = recommender_task(data)
    weights = {f"model.{name}": tensor for name, tensor in task.model.state_dict().items()}
    task.export(weights, tmp_path)
    slots_IE = ItemEmbeddings.load(tmp_path).standardised().numpy()
    assert not slots_IE[cold_I].any()
    np.testing.assert_allclose(slots_IE[~cold_I].std(axis=0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(slots_IE[~cold_I].mean(axis=0), 0.0, atol=1e-6)
    assert task.model.item_table.detach().numpy()[cold_I].all(), "scores keep their vectors"
