"""Tables of a report from made-up scores, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small_data import TITLES, small_data

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.errors import EvaluationError
from rsllm.evaluate.compare import by_target, estimates, method_table, over_seeds, per_user
from rsllm.evaluate.groups import BY_COUNT, target_groups
from rsllm.evaluate.metrics import RULES
from rsllm.evaluate.rank import fixed_sample, presented_places, target_places
from rsllm.evaluate.run import Method, Outcome
from rsllm.evaluate.statistics import paired

NUM_ROWS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small", num_held_out=NUM_ROWS)


@pytest.fixture(scope="module")
def rows(data: PreparedData) -> Rows:
    return data.rows("test")


def outcome(name: str, rows: Rows, ranks: list[int]) -> Outcome:
    """Scores under which the targets have these ranks."""
    assert rows.candidates_RC is not None
    scores_RC = np.zeros(rows.candidates_RC.shape)
    for scores_C, place, rank in zip(scores_RC, target_places(rows), ranks, strict=True):
        others = [c for c in range(len(scores_C)) if c != place]
        scores_C[others] = -1.0
        scores_C[others[: rank - 1]] = 1.0
    return Outcome(
        method=Method(name=name, scorer="likelihood", experiment=Experiment()),
        scores_DRC=scores_RC[None],
        seconds=2.5,
    )


def test_method_table(rows: Rows, data: PreparedData) -> None:
    ranks = [1] * 6 + [2] * 3 + [4] * 3
    first = outcome("first", rows, ranks)
    second = replace(first, likelihood_DRC=outcome("", rows, [2] * NUM_ROWS).scores_DRC)
    entry, other = method_table({"first": [first], "second": [second]}, [rows], data)
    assert (entry["name"], entry["scorer"], entry["n"], entry["seconds"]) == (
        "first",
        "likelihood",
        NUM_ROWS,
        2.5,
    )
    values = {name: metric["value"] for name, metric in entry["metrics"].items()}
    ndcg = (6 + 3 / np.log2(3) + 3 / np.log2(5)) / 12
    assert values == pytest.approx(
        {
            "HR@1": 0.5,
            "HR@5": 1.0,
            "HR@10": 1.0,
            "NDCG@5": ndcg,
            "NDCG@10": ndcg,
            "MRR": (6 + 3 / 2 + 3 / 4) / 12,
        }
    )
    hits = entry["metrics"]["HR@1"]
    assert (hits["low"], hits["high"]) == pytest.approx((0.2538, 0.7462), abs=1e-4), "Wilson"
    assert all(metric["n"] == NUM_ROWS for metric in entry["metrics"].values())
    assert entry["likelihood_metrics"] is None
    assert entry["generation"] is None
    assert other["metrics"] == entry["metrics"]
    assert other["likelihood_metrics"]["MRR"]["value"] == 0.5


def test_metrics_by_target(rows: Rows, data: PreparedData) -> None:
    outcomes = [outcome("a", rows, ranks) for ranks in ([1] * 6 + [2] * 6, [1, 2, 4] * 4)]
    (entry,) = method_table({"a": outcomes}, [rows], data)
    expected = by_target(over_seeds(outcomes, [rows]), target_groups(rows, data))
    assert entry["by_target"] == expected
    assert sum(expected[name]["n"] for name in BY_COUNT) == NUM_ROWS


def test_generated_answers_are_judged_on_the_rows_they_belong_to(
    rows: Rows, data: PreparedData
) -> None:
    answered = fixed_sample(rows, 4)
    assert answered.candidates_RC is not None
    targets = [TITLES[target] for target in answered.target_R]
    others = [
        next(TITLES[c] for c in candidates if c != target)
        for candidates, target in zip(answered.candidates_RC, answered.target_R, strict=True)
    ]
    free = [targets[0], f" {targets[1].upper()}.", others[2], f"{targets[3]} or {others[3]}"]
    made_up = replace(
        outcome("first", rows, [1] * NUM_ROWS), answers={"free": free, "constrained": targets[:3]}
    )
    (entry,) = method_table({"first": [made_up]}, [rows], data)
    found = {
        (decoding, rule): judged
        for decoding, rules in entry["generation"].items()
        for rule, judged in rules.items()
    }
    assert list(found) == [(d, r) for d in ("free", "constrained") for r in RULES]
    generation, strict = found["free", "LLaRA"], found["free", "strict"]
    assert generation["n"] == strict["n"] == 4
    assert generation["ValidRatio"]["value"] == 3 / 4
    assert generation["hits_of_all"]["value"] == 2 / 4
    assert generation["hits_of_valid"]["value"] == 2 / 3
    assert generation["hits_of_valid"]["n"] == 3
    assert strict["ValidRatio"]["value"] == 2 / 4
    assert strict["hits_of_all"]["value"] == 1 / 4
    assert found["constrained", "strict"]["n"] == 3
    assert found["constrained", "catalogue"]["ValidRatio"]["value"] == 1
    assert found["free", "catalogue"]["ValidRatio"]["value"] == 2 / 4
    assert found["free", "catalogue"]["hits_of_all"]["value"] == 1 / 4

    silent = replace(made_up, answers={"free": [""] * 4})
    (entry,) = method_table({"first": [silent]}, [rows], data)
    assert entry["generation"]["free"]["LLaRA"]["hits_of_all"]["value"] == 0
    assert entry["generation"]["free"]["LLaRA"]["hits_of_valid"] is None


def test_a_perfect_answer_that_holds_another_title_is_counted(
    rows: Rows, data: PreparedData
) -> None:
    """By LLaRA's rule no answer is right where the target's title holds another candidate's."""
    answered = fixed_sample(rows, 4)
    assert answered.candidates_RC is not None
    titles = list(data.titles)
    target, other = (
        answered.target_R[0],
        next(item for item in answered.candidates_RC[0] if item not in answered.target_R),
    )
    titles[other] = titles[target][:4]
    renamed = SimpleNamespace(
        titles=titles, catalogue=data.catalogue, facts={"counts": {"timed": False}}
    )
    made_up = replace(outcome("first", rows, [1] * NUM_ROWS), answers={"free": [""] * 4})
    (entry,) = method_table({"first": [made_up]}, [rows], renamed)
    rules = entry["generation"]["free"]
    found = {rule: judged["perfect_invalid"] for rule, judged in rules.items()}
    affected = [
        other in candidates and titles[other].lower() in titles[own].lower()
        for candidates, own in zip(answered.candidates_RC, answered.target_R, strict=True)
    ]
    assert found == {"LLaRA": sum(affected) / 4, "strict": 0.0, "catalogue": 0.0}
    assert affected[0]


def test_order_bias_of_a_method(rows: Rows, data: PreparedData) -> None:
    plain = outcome("plain", rows, [1] * 9 + [2] * 3)
    steady = replace(plain, orders_PRC=np.repeat(plain.scores_DRC, 3, axis=0))
    swayed = replace(plain, orders_PRC=-presented_places(rows, 3).astype(float))
    methods = {"plain": [plain], "steady": [steady], "swayed": [swayed]}
    entries = method_table(methods, [rows], data)
    assert entries[0]["candidate_orders"] is None
    steady_found, swayed_found = (entry["candidate_orders"] for entry in entries[1:])
    assert steady_found["orders"] == 4
    assert steady_found["first_choice_changes"]["value"] == 0
    assert (steady_found["HR@1 mean"], steady_found["HR@1 spread"]) == (0.75, 0.0)
    assert swayed_found["first_choice_changes"]["value"] > 0.5
    assert swayed_found["HR@1, first third"] > swayed_found["HR@1, last third"]


def test_metrics_are_means_over_the_draws(rows: Rows) -> None:
    first, second = ([1] * NUM_ROWS, [2] * 6 + [5] * 6)
    scores = [outcome("", rows, ranks).scores_DRC[0] for ranks in (first, second)]
    found = per_user(np.stack(scores), [rows, rows])
    assert found["HR@1"].tolist() == [0.5] * NUM_ROWS
    assert found["MRR"].tolist() == [0.75] * 6 + [0.6] * 6


def test_methods_of_several_seeds(rows: Rows, data: PreparedData) -> None:
    """Means over seeds; answers, orders and seconds are the first seed's."""

    def of_seed(seed: int, ranks: list[int]) -> Outcome:
        found = outcome("tuned", rows, ranks)
        experiment = replace_in(Experiment(), {"stage2.seed": seed})
        method = replace(found.method, experiment=experiment)
        return replace(found, method=method, likelihood_DRC=found.scores_DRC)

    first = replace(of_seed(7, [1] * NUM_ROWS), answers={"free": [""] * 4})
    second = of_seed(8, [1] * 6 + [4] * 6)
    (entry,) = method_table({"tuned": [first, second]}, [rows], data)
    assert entry["metrics"]["MRR"]["value"] == pytest.approx((1 + 0.625) / 2)
    assert entry["metrics"]["MRR"]["n"] == NUM_ROWS
    assert entry["likelihood_metrics"] == entry["metrics"]
    assert entry["per_token_metrics"] is None
    means = {seed: found["HR@1"]["value"] for seed, found in entry["by_seed"].items()}
    assert means == {"7": 1.0, "8": 0.5}
    assert entry["generation"]["free"]["LLaRA"]["n"] == 4
    vectors = {"tuned": over_seeds([first, second], [rows]), "one": over_seeds([second], [rows])}
    assert vectors["tuned"]["MRR"].shape == (2, NUM_ROWS)
    test = paired(vectors["tuned"]["HR@1"], vectors["one"]["HR@1"])
    assert test.difference.value == 0.25
    assert test.test == "sign-flip permutation"
    assert test.p == pytest.approx(2 / 2**6), "six users moved, all up"


def test_estimates_of_expectations(rows: Rows) -> None:
    expectations = replace(outcome("r", rows, [1] * NUM_ROWS), expected={"MRR": np.arange(4) / 4})
    table = estimates(expectations.expected)
    assert list(table) == ["MRR"]
    assert (table["MRR"]["value"], table["MRR"]["n"]) == (0.375, 4)
    assert table["MRR"]["low"] < 0.375 < table["MRR"]["high"]


def test_scores_of_other_rows_are_refused(rows: Rows, data: PreparedData) -> None:
    fewer = outcome("first", fixed_sample(rows, 5), [1] * 5)
    with pytest.raises(EvaluationError, match="1 draws of 5 rows were scored, but 1 of 12"):
        method_table({"fewer": [fewer]}, [rows], data)
