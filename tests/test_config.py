"""Experiments: what is refused, how variants are written, and hashes that stay."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from rsllm.config import DataConfig, Experiment, LossConfig, StageConfig, TableConfig
from rsllm.config.data import plain_of_known
from rsllm.config.plain import content_hash, from_dict, replace_in, to_dict
from rsllm.errors import ConfigError

VARIANT = replace_in(
    Experiment(),
    {
        "data.source": "synthetic",
        "backbone.lora_targets": ["q_proj", "v_proj"],
        "stage2.loss.alpha": 0.25,
        "stage2.accumulation": 4,
        "evaluation.generation_rows": -1,
    },
)


@pytest.mark.parametrize("experiment", [Experiment(), VARIANT])
def test_round_trip_through_json(experiment: Experiment) -> None:
    text = json.dumps(to_dict(experiment))
    again = from_dict(Experiment, json.loads(text))
    assert again == experiment
    assert json.dumps(to_dict(again)) == text
    assert isinstance(again.backbone.lora_targets, tuple)


def test_a_variant_changes_what_it_names_and_nothing_else() -> None:
    base = Experiment()
    changed = replace_in(base, {"stage2.loss.alpha": 0.3, "data.seed": 4})
    assert changed.stage2.loss == dataclasses.replace(base.stage2.loss, alpha=0.3)
    assert changed.data == DataConfig(seed=4)
    assert changed.stage1 == base.stage1
    assert replace_in(base, {}) == base
    assert replace_in(base, {"stage2.loss": LossConfig(beta=0.2)}).stage2.loss.beta == 0.2


@pytest.mark.parametrize(
    ("settings", "key"),
    [({}, "1664535fdf42e850"), ({"source": "llara-lastfm", "split": "given"}, "993372d8b7ffb467")],
)
def test_known_data_keep_the_names_that_earlier_builds_gave(
    settings: dict[str, str], key: str
) -> None:
    named = plain_of_known(DataConfig(**settings))
    assert content_hash({"config": named, "raw": {}}) == key
    assert plain_of_known(DataConfig(split="leave-one-out")) != plain_of_known(DataConfig())
    read_otherwise = DataConfig(table=TableConfig(encoding="latin-1"))
    assert plain_of_known(read_otherwise) != plain_of_known(DataConfig())


def test_an_integer_will_do_for_a_number() -> None:
    loss = replace_in(Experiment(), {"stage2.loss.gamma": 1}).stage2.loss
    assert loss.gamma == 1.0
    assert isinstance(loss.gamma, float)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stage3.seed", 0, "no setting 'stage3.seed'"),
        ("stage2.lose.alpha", 0, "no setting 'stage2.lose.alpha'"),
        ("stage2.loss.alpha.x", 0, "no setting 'stage2.loss.alpha.x'"),
        ("data.windows", 5, "no setting 'data.windows'"),
        ("data.window", "ten", "data.window is 'ten'; it should be a valid integer"),
        ("data.window", 2.5, "window is 2.5; it should be a valid integer"),
        ("data.window", True, "window is True; it should be a valid integer"),
        ("data.source", 5, "source is 5; it should be a valid string"),
        ("stage2.loss.alpha", "x", "stage2.loss.alpha is 'x'; it should be a valid number"),
        ("stage2.loss.alpha", float("nan"), "alpha is nan; it should be a finite number"),
        ("stage2.loss.scorer", "magic", r"scorer is 'magic'; it should be .*'pointer'"),
        ("stage2.representation", "both", r"representation is 'both'; .*'text', .*'unified'"),
        ("recommender.model", "bert4rec", r"model is 'bert4rec'; choose one of .*caser"),
        ("recommender.loss", "bpr", r"loss is 'bpr'; it should be .*'sampled-softmax'"),
        ("compute.precision", "fp8", r"precision is 'fp8'; it should be .*'bf16'"),
    ],
)
def test_a_wrong_override_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace_in(Experiment(), {path: value})


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="LossConfig: delta is 1; Unexpected keyword"):
        from_dict(LossConfig, {"delta": 1})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data.window": 0}, "greater than 0"),
    ({"data.min_history": 0}, "choose 1 to data.window = 10"),
    ({"data.min_history": 11}, "choose 1 to data.window = 10"),
    ({"data.num_candidates": 1}, "greater than or equal to 2"),
    (
        {"data.candidates": "full", "data.num_draws": 2},
        "num_draws is 2, but with data.candidates = full every draw is the same; choose 1",
    ),
    (
        {"data.candidates": "recommender", "data.num_draws": 2},
        "num_draws is 2, but with data.candidates = recommender every draw is the same; choose 1",
    ),
    ({"data.train_share": 0.0}, "greater than 0"),
    ({"data.train_share": 1.5}, "less than 1"),
    ({"data.num_shards": 0}, "greater than 0"),
    ({"data.max_rejected_rows": -1}, "greater than or equal to 0"),
    ({"data.seed": -1}, "greater than or equal to 0"),
    ({"recommender.width": 0}, "greater than 0"),
    ({"recommender.num_heads": 3}, "64 is not a multiple of num_heads"),
    ({"recommender.dropout": 1.0}, "less than 1"),
    ({"recommender.learning_rate": 0.0}, "greater than 0"),
    ({"recommender.max_epochs": -1.0}, "greater than 0"),
    ({"recommender.num_filters": 0}, "greater than 0"),
    ({"recommender.num_negatives": 0}, "greater than 0"),
    ({"recommender.folds": -1}, "greater than or equal to 0"),
    ({"recommender.folds": 1}, "choose 0, or 2 or more"),
    ({"recommender.weight_decay": -0.1}, "greater than or equal to 0"),
    ({"backbone.lora_rank": 0}, "greater than 0"),
    ({"backbone.lora_dropout": -0.1}, "greater than or equal to 0"),
    ({"prompt.max_title_tokens": 0}, "greater than 0"),
    ({"prompt.max_tokens": 15}, "greater than or equal to 16"),
    ({"projector.hidden": 0}, "greater than 0"),
    ({"projector.depth": -1}, "greater than or equal to 0"),
    ({"projector.scale": 0.0}, "greater than 0"),
    ({"stage2.loss.alpha": -0.1}, "greater than or equal to 0"),
    ({"stage2.loss.alpha": 0.6, "stage2.loss.beta": 0.5}, "keep the sum below 1"),
    ({"stage2.loss.temperature": 0.0}, "greater than 0"),
    ({"stage2.loss.negatives": "some"}, "'catalogue' or 'batch'"),
    ({"stage2.loss.scorer": "catalogue"}, "'likelihood' or 'pointer'"),
    ({"stage2.prompts": "story"}, "'choice' or 'history'"),
    ({"stage2.catalogue_learning_rate": 0.0}, "greater than 0"),
    ({"prompt.history_items": 0}, "greater than 0"),
    ({"catalogue.title_width": 0}, "greater than 0"),
    ({"catalogue.user_state": "first"}, "'last' or 'mean'"),
    ({"catalogue.recency": 0.0}, "greater than 0"),
    ({"catalogue.recency": 1.5}, "less than or equal to 1"),
    ({"catalogue.temperature": 0.0}, "greater than 0"),
    ({"catalogue.max_epochs": -1.0}, "greater than or equal to 0"),
    ({"catalogue.batch_size": 0}, "greater than 0"),
    ({"catalogue.patience": 0}, "greater than 0"),
    ({"stage2.loss.gamma": -2.0}, "greater than or equal to 0"),
    ({"stage2.loss.alignment": -0.5}, "greater than or equal to 0"),
    ({"stage2.samples": -1}, "greater than or equal to 0"),
    ({"stage2.batch_size": 0}, "greater than 0"),
    ({"stage2.accumulation": 3}, "8 is not a multiple of accumulation"),
    ({"stage2.lora_learning_rate": 0.0}, "greater than 0"),
    ({"stage2.max_gradient_norm": 0.0}, "greater than 0"),
    ({"stage2.warmup_share": 1.0}, "less than 1"),
    ({"compute.workers": -1}, "greater than or equal to 0"),
    ({"compute.zero_stage": 4}, "0, 1, 2 or 3"),
    ({"compute.threads": -2}, "greater than or equal to 0"),
    ({"evaluation.validation_rows": -1}, "greater than or equal to 0"),
    ({"evaluation.test_rows": -1}, "greater than or equal to 0"),
    ({"evaluation.generation_rows": -2}, "greater than or equal to -1"),
    ({"evaluation.max_new_tokens": 0}, "greater than 0"),
    ({"evaluation.candidate_orders": -1}, "greater than or equal to 0"),
    ({"evaluation.batch_size": 0}, "greater than 0"),
    ({"backbone.lora_targets": "q_proj"}, "should be a valid array"),
    ({"data": 5}, "should be an object"),
]


@pytest.mark.parametrize(("overrides", "way_out"), REFUSED, ids=str)
def test_a_refusal_says_setting_value_and_way_out(overrides: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out) as caught:
        replace_in(Experiment(), overrides)
    for path, value in overrides.items():
        assert path.rsplit(".", 1)[-1] in str(caught.value)
        assert re.search(rf"(?<!\d){re.escape(str(value))}", str(caught.value))


@pytest.mark.parametrize("values", [{"window": 0}, {"window": 2.5}, {"windows": 5}], ids=str)
def test_a_section_by_itself_refuses_every_time(values: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"DataConfig: windows? is "):
            DataConfig(**values)
    assert DataConfig(window=5).window == 5


@pytest.mark.parametrize(
    "settings", [{"curriculum": True}, {"trains": "projector"}, {"loss.alignment": 0.1}], ids=str
)
def test_what_needs_slots_refuses_prompts_without(settings: dict[str, Any]) -> None:
    paths = {f"stage2.{name}": value for name, value in settings.items()}
    assert replace_in(Experiment(), paths) != Experiment()
    with pytest.raises(ConfigError, match=r"is text, which has no slots .* behavioural, llara"):
        replace_in(Experiment(), {**paths, "stage2.representation": "text"})


def test_letters_answer_at_most_26_candidates_and_have_no_title_to_contrast() -> None:
    letters = {"prompt.answer": "letter", "stage1.loss.alpha": 0.0, "stage2.loss.alpha": 0.0}
    assert replace_in(Experiment(), letters).prompt.answer == "letter"
    with pytest.raises(ConfigError, match=r"num_candidates is 27.* 26 letters"):
        replace_in(Experiment(), {**letters, "data.num_candidates": 27})
    with pytest.raises(ConfigError, match=r"stage2\.loss\.alpha is 0\.2.* set it to 0"):
        replace_in(Experiment(), {**letters, "stage2.loss.alpha": 0.2})
    with pytest.raises(ConfigError, match=r"stage2\.loss\.alpha is 0.* its alignment 0\.1"):
        replace_in(Experiment(), {**letters, "stage2.loss.alignment": 0.1})
    silent = {"prompt.answer": "letter", "stage1.samples": 0, "stage2.loss.alpha": 0.0}
    assert replace_in(Experiment(), silent).stage1.loss.alpha
    with pytest.raises(ConfigError, match=r"evaluation\.decoding has catalogue.* leave it out"):
        replace_in(Experiment(), {**silent, "evaluation.decoding": ["free", "catalogue"]})


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss.gamma", 0.5),
        ("loss.alignment", 0.1),
        ("loss.symmetric", True),
        ("gradient_caching", True),
        ("curriculum", True),
    ],
)
def test_history_prompts_refuse_what_they_have_no_use_for(
    stage: str, name: str, value: Any
) -> None:
    history = {f"{stage}.prompts": "history", f"{stage}.representation": "unified"}
    asked = {**history, "backbone.lora_dropout": 0.0, f"{stage}.{name}": value}
    assert replace_in(Experiment(), history) != Experiment()
    assert replace_in(Experiment(), {**asked, f"{stage}.prompts": "choice"}) != Experiment()
    with pytest.raises(ConfigError, match=rf"stage\.{name} is {value}.* set it to 0 or false"):
        replace_in(Experiment(), asked)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_all_weight_may_go_to_contrasts_of_history_prompts_alone(stage: str) -> None:
    whole = {f"{stage}.loss.alpha": 0.7, f"{stage}.loss.beta": 0.3}
    with pytest.raises(ConfigError, match=r"alpha 0\.7 .*beta 0\.3 leaves .* keep the sum below"):
        replace_in(Experiment(), whole)
    history = {**whole, f"{stage}.prompts": "history"}
    assert replace_in(Experiment(), history) != Experiment()
    with pytest.raises(ConfigError, match=r"alpha 0\.8 .*beta 0\.3 is more .* or at 1 under hist"):
        replace_in(Experiment(), {**history, f"{stage}.loss.alpha": 0.8})


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_letters_answer_no_history_prompt(stage: str) -> None:
    letters = {"prompt.answer": "letter", "stage1.loss.alpha": 0.0, "stage2.loss.alpha": 0.0}
    with pytest.raises(ConfigError, match=rf"is letter, but {stage}\.prompts = history .*= title"):
        replace_in(Experiment(), {**letters, f"{stage}.prompts": "history"})
    unused = {**letters, f"{stage}.prompts": "history", f"{stage}.samples": 0}
    assert replace_in(Experiment(), unused).prompt.answer == "letter"


def test_other_data_has_no_part_in_contrasts_of_history_prompts() -> None:
    mixed = {"mixture": [{"data": {"source": "synthetic"}}], "stage1.prompts": "history"}
    with pytest.raises(ConfigError, match=r"stage1\.loss\.beta is 0\.1.* mixture .* set both to 0"):
        replace_in(Experiment(), {**mixed, "stage1.loss.alpha": 0.1, "stage1.loss.beta": 0.0})
    alone = {**mixed, "stage1.loss.alpha": 0.0, "stage1.loss.beta": 0.0}
    assert len(replace_in(Experiment(), alone).mixture) == 1


def test_what_a_stage_ranks_by() -> None:
    history = StageConfig(representation="unified", samples=8, prompts="history")
    titles = LossConfig(alpha=0.5, beta=0.0)
    assert history.ranks_by == "catalogue"
    assert dataclasses.replace(history, loss=titles).ranks_by == "likelihood"
    choice = dataclasses.replace(history, prompts="choice")
    assert choice.ranks_by == "likelihood"
    pointed = dataclasses.replace(choice, loss=LossConfig(gamma=1.0, scorer="pointer"))
    assert pointed.ranks_by == "pointer"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_cached_gradients_need_the_same_network_twice(stage: str) -> None:
    paths = {f"{stage}.gradient_caching": True, "backbone.lora_dropout": 0.1}
    with pytest.raises(ConfigError, match=rf"{stage}\.gradient_caching .*lora_dropout is 0\.1"):
        replace_in(Experiment(), paths)
    assert replace_in(Experiment(), {**paths, "backbone.lora_dropout": 0.0})


def test_steps_are_rounded_down() -> None:
    assert StageConfig(representation="text", samples=23, batch_size=8).steps == 2


def test_the_content_hash_depends_on_content_alone() -> None:
    assert content_hash({"b": 1, "a": [0.5, "x"]}) == "9ba1833eb37d5171"
    assert content_hash({"a": [0.5, "x"], "b": 1}) == "9ba1833eb37d5171"
    assert content_hash(Experiment()) == content_hash(from_dict(Experiment, to_dict(Experiment())))
    assert content_hash(Experiment()) != content_hash(VARIANT)
