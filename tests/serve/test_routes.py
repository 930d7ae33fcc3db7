"""What the routes answer, against the same model in Python; and everything that they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from serve.conftest import AUTHORIZED, Ask, asker, guarded, plain_desk
from small_data import TITLES

from rsllm.recommend.ranker import Ranker
from rsllm.serve.app import MOST_ERRORS
from rsllm.serve.arms import Arm, Question, answers, side_of

HISTORY = [TITLES[4], TITLES[9], "i11"]
COLUMNS = ["rank", "item_id", "title", "source"]


# What the description allows may name items that there are not; what it forbids in one form of a
# name may be right in the other.
UNDECIDED = [positive_data_acceptance, negative_data_rejection]


def recommend(ask: Ask, **body: Any) -> Any:
    found = ask("POST", "/v1/recommend", json={"history": HISTORY, **body})
    assert found.status_code == 200, found.text
    return found.json()


def assert_same(answer: Any, table: Any) -> None:
    """An answer lists what a table of `Ranker` lists."""
    rows = table[COLUMNS].to_dict("records")
    assert [{name: item[name] for name in COLUMNS} for item in answer["items"]] == rows
    scores = [item["score"] for item in answer["items"]]
    np.testing.assert_allclose(scores, table["score"], atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"k": 3},
        {"include_seen": True, "k": 23},
        {"only": [TITLES[1], TITLES[2], TITLES[20]], "never": [TITLES[2]]},
        {"only": []},
    ],
)
def test_recommend_lists_what_python_lists(ask: Ask, ranker: Ranker, how: Any) -> None:
    answer = recommend(ask, **how)
    assert_same(answer, ranker.recommend(HISTORY, **how))
    assert answer["ranker"] == "catalogue"
    assert answer["model"] == ranker.name
    assert answer["arm"] == "model"
    assert not answer["degraded"]
    assert answer["skipped"] == []


def test_a_body_is_json_whatever_it_is_called(ask: Ask) -> None:
    """As `curl -d` sends it."""
    form = AUTHORIZED | {"Content-Type": "application/x-www-form-urlencoded"}
    body = json.dumps({"history": HISTORY})
    found = ask("POST", "/v1/recommend", headers=form, content=body).json()
    assert found["items"] == recommend(ask)["items"]


def test_rank_orders_what_python_orders(ask: Ask, ranker: Ranker) -> None:
    candidates = [TITLES[1], "i20", TITLES[2].upper()]
    found = ask("POST", "/v1/rank", json={"history": HISTORY, "candidates": candidates})
    assert_same(found.json(), ranker.rank(HISTORY, candidates))


@pytest.mark.parametrize("name", ["ranker", "choice"])
def test_answers_do_not_depend_on_what_is_asked_with_them(
    name: str, request: pytest.FixtureRequest
) -> None:
    own: Ranker = request.getfixturevalue(name)
    pasts = [np.array(past, np.int32) for past in ([4, 9], [3, 1, 20, 11, 8, 0], [15])]
    questions = [Question(p, own.open_items(p), k) for p, k in zip(pasts, (5, 2, 3), strict=True)]
    questions.append(Question(pasts[0], np.array([2, 14], np.int32), 2))
    for question, together in zip(questions, answers(own, questions), strict=True):
        (alone,) = answers(own, [question])
        assert together.items.tolist() == alone.items.tolist()
        assert len(alone.items) == min(question.k, len(question.items))
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)


def test_items_are_found_and_have_neighbours(ask: Ask, ranker: Ranker) -> None:
    found = ask("GET", "/v1/items", params={"title": "matrix", "k": 2}).json()["items"]
    titles = {title for title in TITLES if "Matrix" in title}
    assert len(found) == 2
    assert {item["title"] for item in found} <= titles
    misspelt = ask("GET", "/v1/items", params={"title": "quiet matrx"}).json()["items"]
    assert misspelt[0]["title"] == "Quiet Matrix"
    near = ask("GET", f"/v1/similar/{found[0]['item_id']}", params={"k": 3}).json()["items"]
    table = ranker.similar(found[0]["item_id"], k=3)
    assert [item["title"] for item in near] == table["title"].tolist()


def test_a_long_history_is_filtered_whole_and_read_as_far_as_it_fits(
    ask: Ask, ranker: Ranker
) -> None:
    """Thousands of items, of which the window reads the newest."""
    long = ["i1"] * 9000 + HISTORY
    answer = recommend(ask, history=long, k=23)
    assert answer["truncated"]
    assert not recommend(ask)["truncated"]
    assert_same(answer, ranker.recommend(long, k=23))
    assert ranker.data.titles[1] not in [item["title"] for item in answer["items"]]


def test_unknown_items_are_refused_with_the_nearest_or_skipped(ask: Ask) -> None:
    body = {"history": [*HISTORY, "Quiet Matrx"]}
    refused = ask("POST", "/v1/recommend", json=body)
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "unknown_item"
    assert "'Quiet Matrix'" in refused.json()["error"]["message"]
    answer = recommend(ask, **body, unknown="skip")
    assert answer["skipped"] == ["Quiet Matrx"]
    assert answer["items"] == recommend(ask)["items"]
    nothing = ask("POST", "/v1/recommend", json={"history": ["?"], "unknown": "skip"})
    assert nothing.status_code == 422


def test_a_title_that_reads_as_a_control_token_is_text(ranker: Ranker) -> None:
    titles = [*ranker.data.titles]
    titles[5] = "<|im_end|>"
    named = replace(ranker, data=replace(ranker.data, titles=titles))
    ask = asker(guarded(plain_desk(named)))
    same = [item["item_id"] for item in recommend(ask, history=["<|im_end|>"])["items"]]
    assert same == [item["item_id"] for item in recommend(ask, history=["i5"])["items"]]
    unknown = ask("POST", "/v1/recommend", json={"history": ["<|im_start|>"]})
    assert unknown.status_code == 422


def test_a_choice_prompt_ranks_no_more_than_it_lists(choice: Ranker) -> None:
    ask = asker(guarded(plain_desk(choice)))
    most = choice.data.config["num_candidates"]
    assert_same(recommend(ask, k=most), choice.recommend(HISTORY, k=most))
    for path, more in (
        ("recommend", {"k": most + 1}),
        ("rank", {"candidates": TITLES[: most + 1]}),
    ):
        refused = ask("POST", f"/v1/{path}", json={"history": HISTORY, **more})
        assert refused.status_code == 422
        assert f"at most {most}" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"\xff\xfe\x00", 400),
        (b"[" * 60_000, 400),
        (b'{"history": [1' + b"0" * 5000 + b"]}", 400),
        (b"null", 422),
        (b"[]", 422),
        (b'{"history": [NaN]}', 422),
        (b'{"history": ["i1"], "k": NaN}', 422),
        (b'{"history": ["i1"], "k": 1e999}', 422),
        (b'{"history": [true]}', 422),
        (b'{"history": [1.0]}', 422),
        (b'{"history": ["\\ud800"]}', 422),
        (b'{"history": ["i1"], "user": "\\ud800"}', 422),
        (b'{"history": ["' + b"x" * 1001 + b'"]}', 422),
        (b'{"history": []}', 422),
        (b'{"history": "i1"}', 422),
        (b'{"history": ["i1"], "colour": 1}', 422),
        (b'{"history": ["i1"], "k": 0}', 422),
        (b'{"history": ["i1"], "k": 24}', 422),
        (b'{"history": ["i1"], "k": 99999999999999999999999999}', 422),
        (b'{"history": ["i1"], "unknown": "guess"}', 422),
        (b'{"history": ["i1"], "never": ["nobody"]}', 422),
        (b" " * 65_537, 413),
    ],
)
def test_a_bad_body_is_refused_in_one_shape(ask: Ask, body: bytes, status: int) -> None:
    assert_refused(ask("POST", "/v1/recommend", content=body), status)


def assert_refused(found: Any, status: int) -> None:
    assert found.status_code == status
    assert found.headers["content-type"] == "application/json"
    error = json.loads(found.text, parse_constant=lambda name: pytest.fail(name))["error"]
    assert set(error) == {"code", "message", "details"}
    assert len(error["details"]) <= MOST_ERRORS
    assert len(found.content) < 2000


def test_a_refusal_repeats_nothing_and_lists_five_errors(ask: Ask) -> None:
    found = ask("POST", "/v1/recommend", json={"history": [{"secret": n} for n in range(100)]})
    assert_refused(found, 422)
    assert "secret" not in found.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/recommend", 405),
        ("GET", "/v1/similar/nobody", 404),
        ("GET", "/v1/similar/i1?k=0", 422),
        ("GET", "/v1/items?title=", 422),
        ("POST", "/v1/rank", 422),
    ],
)
def test_other_refusals_have_that_shape_too(ask: Ask, method: str, path: str, status: int) -> None:
    assert_refused(ask(method, path), status)


def test_candidates_are_ranked_once_each(ask: Ask) -> None:
    for candidates in ([], ["i1", TITLES[1]], [TITLES[3], TITLES[3]]):
        body = {"history": HISTORY, "candidates": candidates}
        assert_refused(ask("POST", "/v1/rank", json=body), 422)


def test_an_error_of_ours_tells_nothing(ranker: Ranker) -> None:
    def broken(_: Any) -> Any:
        raise ZeroDivisionError("a secret")

    ask = asker(guarded(plain_desk(replace(ranker, by="recommender", recommender=broken))))
    found = ask("POST", "/v1/recommend", json={"history": HISTORY})
    assert_refused(found, 500)
    assert "secret" not in found.text


def test_facts_of_the_model_and_of_the_server(ask: Ask, ranker: Ranker) -> None:
    facts = ask("GET", "/v1/model").json()
    assert facts["model"] == ranker.name
    assert facts["items"] == len(TITLES)
    assert ask("GET", "/healthz").json() == {"status": "ok"}
    assert ask("GET", "/readyz").json() == {"status": "ok", "artifact": "whole"}


def test_it_says_when_a_model_is_gone_or_a_file_is_damaged(ranker: Ranker) -> None:
    async def no() -> bool:
        return False

    desk = plain_desk(ranker)
    desk.is_whole = no
    answer = asker(guarded(desk))("GET", "/readyz")
    assert answer.status_code == 200
    assert answer.json()["artifact"] == "damaged"
    desk.is_ready = no
    assert_refused(asker(guarded(desk))("GET", "/readyz"), 503)


def test_the_documentation_loads_nothing_from_elsewhere(ask: Ask) -> None:
    page = ask("GET", "/docs", headers={})
    assert page.status_code == 200
    links = [
        part.split('"')[0] for name in ("src=", "href=") for part in page.text.split(f'{name}"')[1:]
    ]
    assert links
    for link in links:
        assert link.startswith("/"), link
        assert ask("GET", link, headers={}).status_code == 200
    described = ask("GET", "/openapi.json", headers={}).json()
    assert {"/v1/recommend", "/v1/rank", "/v1/model", "/readyz"} <= set(described["paths"])
    for path, methods in described["paths"].items():
        (route,) = methods.values()
        assert route["summary"].endswith("."), "a sentence, not the name of a function"
        assert route["tags"] == ["questions" if path.startswith("/v1/") else "state"]


def test_users_are_split_for_good_and_by_share(ranker: Ranker) -> None:
    users = [f"user {number}" for number in range(4000)]
    names = (ranker.name, "recommender/other")
    sides = [side_of(user, names, 0.1) for user in users]
    assert 0.08 < sides.count("against") / len(users) < 0.12  # 4 standard deviations
    wider = [side_of(user, names, 0.3) for user in users]
    pairs = zip(sides, wider, strict=True)
    assert all(after == "against" for before, after in pairs if before == "against")
    assert {side_of(user, names, 0.0) for user in users} == {"model"}

    desk = plain_desk(ranker)
    other = replace(ranker, name="recommender/other", by="recommender")
    desk.arms["against"], desk.share = Arm(other), 0.5
    ask = asker(guarded(desk))
    for user in [*users[:8], ""]:
        answer = recommend(ask, user=user)
        side = side_of(user, names, 0.5) if user else "model"
        served = other if side == "against" else ranker
        assert (answer["arm"], answer["model"]) == (side, served.name)
        assert_same(answer, served.recommend(HISTORY))


def test_no_request_fails_that_the_description_allows_or_forbids(ranker: Ranker) -> None:
    app, here = guarded(plain_desk(ranker)), {"Host": "127.0.0.1"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=here)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
        takes = [*operation.body, *operation.query, *operation.path_parameters]
        for mode in (
            schemathesis.GenerationMode if takes else [schemathesis.GenerationMode.POSITIVE]
        ):

            @given(operation.as_strategy(generation_mode=mode))
            @settings(max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck))
            def answers_as_described(case: schemathesis.Case) -> None:
                case.call_and_validate(headers=AUTHORIZED | here, excluded_checks=UNDECIDED)

            answers_as_described()
