"""What a study says of made-up evaluations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_data import NUM_CANDIDATES, small_data

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.evaluate.compare import over_seeds, per_user
from rsllm.evaluate.fuse import WEIGHTS, combine_scores
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.run import Method, Outcome
from rsllm.evaluate.statistics import paired
from rsllm.study import study, variants
from rsllm.study.claims import Claim
from rsllm.study.search import TrialRecord
from rsllm.study.study import Study

NUM_ROWS = 30
BASE = replace_in(Experiment(), {"data.num_candidates": NUM_CANDIDATES})


def made_up(seen: list[tuple[list[str], str]]) -> Any:
    """An `evaluate` that draws scores, and keeps what it was asked."""

    def evaluate(methods: Sequence[Method], split: str, **where: Any) -> list[Outcome]:
        seen.append(([method.name for method in methods], split))
        return [
            Outcome(
                method=method,
                scores_DRC=np.random.default_rng([len(method.name), split == "test"]).normal(
                    size=(1, NUM_ROWS, NUM_CANDIDATES)
                ),
                seconds=1.0,
            )
            for method in methods
        ]

    return evaluate


def made_up_method(name: str, seed: int = 0) -> Method:
    scorer: Any = "recommender" if name == "recommender" else "likelihood"
    experiment = replace_in(BASE, {"stage2.seed": seed})
    return Method(name=name, scorer=scorer, experiment=experiment)


@pytest.mark.parametrize("title", ["../../x", "/etc/x", "a\\b", "..", "x" * 300, "Wh\u00e4t?"])
def test_a_title_is_no_path(title: str) -> None:
    named = Study(title=title, question="?", base=BASE, twins=lambda best: {}).name
    assert re.fullmatch(r"[a-z0-9-]{17,64}", named)


def test_the_winner_stands_beside_its_fusion_with_the_recommender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(tmp_path / "small", num_held_out=NUM_ROWS)
    seen: list[tuple[list[str], str]] = []
    monkeypatch.setattr(variants, "evaluate", made_up(seen))
    names = ["recommender", "zero-shot", "best", "second best"]
    methods = {name: [made_up_method(name)] for name in names}
    asked = Study(
        title="made up",
        question="?",
        base=BASE,
        twins=lambda best: {"best": {}},
        claims=[Claim(study.WINNER, "zero-shot")],
    )
    pipeline: Any = SimpleNamespace(
        backbone="", fingerprint="", layout=None, store=SimpleNamespace()
    )
    best = TrialRecord(number=0, state="finished", overrides={}, curve=[{"score": 0.5}])
    found = study._judge(asked, pipeline, data, methods, {"best": []}, best)
    assert seen == [(["recommender", "best"], "validation"), (names, "test")]

    joined = "best + recommender"
    assert [entry["name"] for entry in found["methods"]] == [*names, joined]
    assert {(pair["first"], pair["second"]) for pair in found["pairs"]} == {
        ("best", "zero-shot"),
        (joined, "recommender"),
        (joined, "best"),
    }
    weight = found["fusion"]["weight"]
    best_mrr = max(mrr for _, mrr, _, _ in found["fusion"]["curve"])
    (chosen,) = (point for point in found["fusion"]["curve"] if point[0] == weight)
    assert chosen[1] == best_mrr
    assert chosen[2] < best_mrr < chosen[3]
    (note,) = (note for note in found["notes"] if "joined with the recommender" in note)
    assert f"weight {weight:.3g}, the best of 27 on {NUM_ROWS} validation users" in note
    assert f"MRR {chosen[1]:.3f} [{chosen[2]:.3f}, {chosen[3]:.3f}] there" in note
    alone = [group[0] for group in methods.values()]
    outcomes = dict(zip(names, made_up([])(alone, "test"), strict=True))
    scores_DRC = combine_scores(
        outcomes["best"].scores_DRC, outcomes["recommender"].scores_DRC, weight
    )
    expected = per_user(scores_DRC, held_out(data, "test"))["MRR"].mean()
    assert found["methods"][-1]["metrics"]["MRR"]["value"] == pytest.approx(expected)


def test_a_pointer_also_stands_by_the_likelihood_of_titles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a claim about the ranking loss would be one about its scorer."""
    data = small_data(tmp_path / "small", num_held_out=NUM_ROWS)
    plain = made_up([])

    def evaluate(methods: Sequence[Method], split: str, **where: Any) -> list[Outcome]:
        found: list[Outcome] = plain(methods, split)
        return [
            replace(o, likelihood_DRC=-o.scores_DRC) if o.method.name == "best" else o
            for o in found
        ]

    monkeypatch.setattr(variants, "evaluate", evaluate)
    names = ["recommender", "zero-shot", "best", "other"]
    asked = Study(
        title="made up",
        question="?",
        base=BASE,
        twins=lambda best: {"best": {}, "other": {}},
        claims=[Claim(study.WINNER + study.BY_LIKELIHOOD, "other", "by its titles")],
    )
    pipeline: Any = SimpleNamespace(
        backbone="", fingerprint="", layout=None, store=SimpleNamespace()
    )
    best = TrialRecord(number=0, state="finished", overrides={}, curve=[{"score": 0.5}])
    methods = {name: [made_up_method(name)] for name in names}
    found = study._judge(asked, pipeline, data, methods, {"best": [], "other": []}, best)
    pair = found["pairs"][0]
    assert (pair["first"], pair["claim"]) == ("best, by likelihood", "by its titles")
    draws = held_out(data, "test")
    own, other = (made_up([])(methods[name], "test")[0].scores_DRC for name in ("best", "other"))
    by_titles, others = (per_user(scores, draws)["MRR"] for scores in (-own, other))
    assert pair["difference"]["value"] == pytest.approx((by_titles - others).mean())


def test_seeds_are_averaged_and_share_one_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(tmp_path / "small", num_held_out=NUM_ROWS)
    monkeypatch.setattr(variants, "evaluate", made_up([]))
    seeds = {"best": 0, "best, seed 1": 1, "best, seed 22": 22}
    methods = {
        "recommender": [made_up_method("recommender")],
        "best": [made_up_method(name, seed) for name, seed in seeds.items()],
    }
    asked = Study(
        title="made up", question="?", base=BASE, twins=lambda best: {"best": {}}, num_seeds=3
    )
    pipeline: Any = SimpleNamespace(
        backbone="", fingerprint="", layout=None, store=SimpleNamespace()
    )
    best = TrialRecord(number=0, state="finished", overrides={}, curve=[{"score": 0.5}])
    found = study._judge(asked, pipeline, data, methods, {"best": []}, best)

    def outcomes(split: str) -> tuple[Outcome, list[Outcome]]:
        alone, *group = made_up([])([*methods["recommender"], *methods["best"]], split)
        return alone, group

    alone, group = outcomes("validation")
    (rows,) = held_out(data, "validation")
    curve = {
        weight: np.mean(
            [
                per_user(combine_scores(o.scores_DRC, alone.scores_DRC, weight), [rows])[
                    "MRR"
                ].mean()
                for o in group
            ]
        )
        for weight in WEIGHTS
    }
    assert found["fusion"]["weight"] == max(curve, key=curve.__getitem__)
    assert {weight: mrr for weight, mrr, *_ in found["fusion"]["curve"]} == pytest.approx(curve)

    alone, group = outcomes("test")
    draws = held_out(data, "test")
    entries = {entry["name"]: entry for entry in found["methods"]}
    assert list(entries) == ["recommender", "best", "best + recommender"]
    assert list(entries["best"]["by_seed"]) == ["0", "1", "22"]
    assert entries["recommender"]["by_seed"] == {}
    best_SR = over_seeds(group, draws)["MRR"]
    assert entries["best"]["metrics"]["MRR"]["value"] == pytest.approx(best_SR.mean())
    joined_SR = np.stack(
        [
            per_user(
                combine_scores(o.scores_DRC, alone.scores_DRC, found["fusion"]["weight"]), draws
            )["MRR"]
            for o in group
        ]
    )
    pair = next(p for p in found["pairs"] if (p["second"], p["metric"]) == ("best", "MRR"))
    assert pair["difference"]["value"] == pytest.approx((joined_SR - best_SR).mean())
    assert pair["p"] == pytest.approx(paired(joined_SR, best_SR).p)


def test_later_seeds_rank_but_do_not_answer(tmp_path: Path) -> None:
    base = replace_in(BASE, {"stage1.samples": 0, "evaluation.candidate_orders": 2})
    seeds = (0, 1)
    twin: Any = [
        SimpleNamespace(
            experiment=replace_in(base, {"stage2.seed": seed}), train=lambda: tmp_path / "artifact"
        )
        for seed in seeds
    ]
    asked = Study(title="?", question="?", base=base, twins=lambda best: {"best": {}}, num_seeds=2)
    assert tuple(asked.seeds) == seeds
    methods = study._methods(asked, {"recommender": tmp_path}, {"best": twin, "other": twin})
    assert list(methods) == ["recommender", "zero-shot", "best", "best, shuffled slots", "other"]
    assert [method.name for method in methods["best"]] == ["best", "best, seed 1"]
    for name in ("best", "best, shuffled slots", "other"):
        first, second = (method.experiment for method in methods[name])
        assert first.evaluation == base.evaluation
        assert second.evaluation.generation_rows == -1
        assert second.evaluation.candidate_orders == 0
        assert (first.stage2.seed, second.stage2.seed) == seeds
        shuffled = name.endswith("slots")
        assert first.projector.shuffle_items == second.projector.shuffle_items == shuffled
