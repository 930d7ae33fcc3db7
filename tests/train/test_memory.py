"""What a step needs, from a config alone: known counts, shares, monotony, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from rsllm.cli import main
from rsllm.compute.layout import Layout, Resources
from rsllm.config import BackboneConfig, Experiment, Representation
from rsllm.config.plain import replace_in
from rsllm.errors import ConfigError
from rsllm.model.backbone import load_backbone, load_tokenizer, tunable
from rsllm.plan import read_cluster
from rsllm.prompts.collate import Row
from rsllm.prompts.encode import PromptEncoder
from rsllm.prompts.histories import Whole, collate_histories
from rsllm.train import memory
from rsllm.train.memory import GIB, Shape, Sizes, Step, check_fits, check_launch

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
SHAPES = {
    "Llama-2-7B": (
        LLAMA | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
        6_738_415_616,
    ),
    "Llama-3-8B": (
        LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
        8_030_261_248,
    ),
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
}
SMALL = Shape(rows=2, prompt=40, branches=4, alone=6)


def layout(workers: int = 1, *, gpu: bool = False) -> Layout:
    return Layout(
        workers=workers,
        cpus_per_worker=0.9,
        use_gpu=gpu,
        threads=1,
        precision="bf16" if gpu else "fp32",
        concurrent_trials=1,
    )


def config_only(folder: Path, config: dict[str, Any]) -> Path:
    """A backbone's folder without weights or tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tiny(random_llm: Path) -> Step:
    return Step(random_llm, BackboneConfig(), SMALL, layout())


@pytest.mark.parametrize(("config", "count"), SHAPES.values(), ids=SHAPES)
def test_parameters_of_published_models(config: dict[str, Any], count: int, tmp_path: Path) -> None:
    backbone = config_only(tmp_path / "model", config)
    step = Step(backbone, BackboneConfig(), SMALL, layout(gpu=True))
    assert step.whole["parameters"] == count
    need = step.need(2)
    assert need["weights"] == 2 * count
    assert need["lora"] == 2 * step.whole["trained"]


def test_counts_are_those_of_the_model_itself(random_llm: Path) -> None:
    for config in (BackboneConfig(lora_rank=4, lora_targets=("q_proj",)), BackboneConfig()):
        model = tunable(load_backbone(random_llm, torch.float32), config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = Step(random_llm, config, SMALL, layout()).whole
        assert found["trained"] == trained
        assert found["parameters"] == sum(p.numel() for p in model.parameters()) - trained


def test_activations_are_what_autograd_saves(random_llm: Path) -> None:
    """What each layer adds, against the bytes that hooks on a real pass through two layers see."""
    saved: dict[int, int] = {}
    model = tunable(load_backbone(random_llm, torch.float32), BackboneConfig()).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    vectors_BTD = torch.zeros(8, 200, model.config.hidden_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.get_base_model().get_decoder()(inputs_embeds=vectors_BTD, use_cache=False)
    assert out.last_hidden_state.requires_grad
    shape = Shape(rows=8, prompt=200, branches=0)
    step = Step(random_llm, BackboneConfig(), shape, layout())
    layer = step.whole["activations"] - step.first["activations"]
    assert layer == pytest.approx(sum(saved.values()) / model.config.num_hidden_layers, rel=0.1)


def model_state(step: Step, zero_stage: int, **how: Any) -> Sizes:
    return step._state(zero_stage, how.get("offload", "none"))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_zero_shares_what_its_stage_says(random_llm: Path, tuning: Any) -> None:
    config = BackboneConfig(tuning=tuning)
    alone, four = (Step(random_llm, config, SMALL, layout(n)) for n in (1, 4))
    trained, parameters = alone.whole["trained"], alone.whole["parameters"]
    assert (trained == parameters) == (tuning == "full")
    for stage in range(4):
        one, shared = model_state(alone, stage), model_state(four, stage)
        assert shared["optimizer"] == one["optimizer"] / (4 if stage else 1)
        assert one["optimizer"] == trained * (12 if stage else 8)
        waiting = 4 * min(trained, memory.BUCKET)
        whole = 4 * trained
        assert shared["gradients"] == (whole / 4 + waiting if stage >= 2 else whole)
        gathered = 4 * parameters if stage == 3 else 0
        assert shared["weights"] - gathered == 4 * parameters / (4 if stage == 3 else 1)
    away = model_state(four, 3, offload="parameters")
    assert (away["optimizer"], away["update"], away["lora"]) == (0, 0, 0)


def test_the_bucket_is_the_engines() -> None:
    from rsllm.train.engine import BUCKET_ELEMENTS

    assert memory.BUCKET == BUCKET_ELEMENTS


def test_more_rows_and_branches_need_more_and_checkpointing_less(random_llm: Path) -> None:
    def need(shape: Shape, **changes: Any) -> Sizes:
        return Step(random_llm, BackboneConfig(**changes), shape, layout()).need(2)

    plain = Shape(rows=4, prompt=200, branches=4)
    totals = [need(Shape(rows=n, prompt=200, branches=4))["total"] for n in (2, 4, 8)]
    assert totals == sorted(set(totals))
    ranked = need(Shape(rows=4, prompt=200, branches=80, parallel=True))
    assert ranked["branches"] > 0 == need(plain)["branches"]
    assert ranked["logits"] > need(plain)["logits"]
    assert need(plain, gradient_checkpointing=True)["total"] < need(plain)["total"]


def test_shape_of_each_representation() -> None:
    experiment = Experiment()

    def shape(**settings: Any) -> Shape:
        changed = replace_in(experiment, {f"stage2.{k}": v for k, v in settings.items()})
        return Shape.of(changed, changed.stage2, 1, 5.0)

    widths = [shape(representation=name).prompt for name in ("behavioural", "llara", "unified")]
    assert widths == sorted(widths)
    assert shape().prompt == 30 * (5 + 2 + 1) + memory.TEXT_TOKENS
    assert shape(batch_size=8, accumulation=4).rows == 2
    ranked = replace_in(experiment, {"stage2.loss.gamma": 0.5})
    assert Shape.of(ranked, ranked.stage2, 2, 5.0).branches == 20 * 5


def test_shape_of_history_prompts(random_llm: Path) -> None:
    """Of full windows, with logits where names are foretold; against prompts that are encoded."""
    titles = ["The Last Voyage (1996)", "Golden Garden (1996)", "Quiet Orchestra"]
    settings = {"stage2.prompts": "history", "prompt.history_items": 30, "stage2.batch_size": 8}
    tokenizer = load_tokenizer(random_llm)
    row = Row(history=[0, 1, 2] * 10, candidates=(), target=0, user=0)
    for representation in get_args(Representation):
        chosen = {**settings, "stage2.representation": representation}
        experiment = replace_in(Experiment(), chosen)
        encoder = PromptEncoder(
            tokenizer, titles, experiment.prompt, representation, "movie", form="history"
        )
        whole = Whole.of([row], encoder, np.ones(3))
        batch = collate_histories([row], encoder, 3, whole)
        title = sum(map(len, encoder.title_ids)) / 3
        found = Shape.of(experiment, experiment.stage2, 2, title)
        assert (found.rows, found.branches, found.alone, found.parallel) == (4, 0, 0, False)
        # A template's opening stands before the items, and no separator behind them.
        assert abs(found.prompt - batch.num_tokens) <= len(encoder.history([0], 0).tokens)
        assert found.asked == pytest.approx(len(batch.label_N), abs=title + 1)
        contrasts = {"stage2.loss.alpha": 0.6, "stage2.loss.beta": 0.4}
        alone = replace_in(experiment, contrasts)
        assert Shape.of(alone, alone.stage2, 2, title).asked == 0
    short = replace_in(Experiment(), {**settings, "prompt.max_tokens": 100})
    assert Shape.of(short, short.stage2, 1, 9.0).prompt == 100


def test_logits_of_names_are_planned_for(random_llm: Path, tiny: Step) -> None:
    """As many as are asked for, and none where the contrasts have all weight."""
    shapes = [Shape(rows=2, prompt=40, asked=n) for n in (0, 20, 40)]
    needs = [Step(random_llm, BackboneConfig(), shape, layout()).need(2) for shape in shapes]
    assert needs[0]["logits"] == 0
    assert needs[2]["logits"] == pytest.approx(2 * needs[1]["logits"])
    assert needs[0]["total"] < needs[1]["total"] < needs[2]["total"]
    choice = Step(random_llm, BackboneConfig(), Shape(rows=2, prompt=40, branches=19), layout())
    assert needs[1]["logits"] == choice.need(2)["logits"]


def test_a_doomed_launch_is_refused_with_the_knobs(tiny: Step) -> None:
    need = tiny.need(2)
    check_fits(need, "stage2", need["total"] / 1.1)
    with pytest.raises(
        ConfigError, match=r"stage2 needs .* GiB per worker, most of it process"
    ) as e:
        check_fits(need, "stage2", need["total"] / 1.2)
    for knob in ("stage2.accumulation", "gradient_checkpointing=true", "zero_stage", "offload"):
        assert knob in str(e.value)


def test_a_worker_refuses_before_it_reads_weights(
    random_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that shares this machine with so many others that none of them has room."""
    shutil.copytree(random_llm, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    experiment, titles = Experiment(), ["Titanic (1997)", "Heat"]
    check_launch(experiment, "stage2", tmp_path, titles, layout())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    with pytest.raises(ConfigError, match=r"stage2 needs .* there are 0\.0; try"):
        check_launch(experiment, "stage2", tmp_path, titles, layout())
    (tmp_path / "config.json").unlink()
    check_launch(experiment, "stage2", tmp_path, titles, layout())  # building it says more


def test_what_cannot_be_planned_for_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has no config"):
        Step(tmp_path, BackboneConfig(), SMALL, layout())


def test_cluster_file_says_what_workers_are(tmp_path: Path) -> None:
    machine = read_cluster(ROOT / "cluster" / "gpu.yaml")
    assert machine.resources == Resources(cpus=32, gpus=4, nodes=4)
    assert machine.memory == 22 * GIB
    assert machine.price > 0
    for broken in (ROOT / "cluster" / "local.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(ConfigError, match=r"give the worker type .* gpu-gibibytes"):
            read_cluster(broken)


@pytest.mark.parametrize(("gibibytes", "code"), [("2", 0), ("0.5", 2)])
def test_verb_prints_the_table_and_refuses(
    gibibytes: str, code: int, random_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "cluster" / "gpu.yaml").read_text()
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(text.replace('gpu-gibibytes: "22"', f'gpu-gibibytes: "{gibibytes}"'))
    assert main(["plan", "--backbone", str(random_llm), "--cluster", str(cluster)]) == code
    shown = capsys.readouterr()
    rows = [
        line.split() for line in shown.out.splitlines() if line.strip().startswith(tuple("0123"))
    ]
    assert [(row[0], row[1]) for row in rows[-6:]] == [
        ("1", "none"),
        ("2", "none"),
        ("3", "none"),
        ("2", "optimizer"),
        ("3", "optimizer"),
        ("3", "parameters"),
    ]
    assert {row[-1] for row in rows[-6:]} == {"yes" if code == 0 else "no"}
    assert "dollars" in shown.out
    assert ("try more" in shown.err) == (code == 2)
