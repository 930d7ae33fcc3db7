"""The card beside an adapter, read as the Hugging Face hub reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from scipy.stats import binomtest
from small_data import small_data

from rsllm.assets.catalogue import ASSETS
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.report.card import CARD, write_card
from rsllm.store.artifacts import commit_dir, manifest

HOSTILE = 'x"\n---\nlicense: mit\n<script>alert(1)</script> [x](javascript:1) `b` | \\'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small")


def written(folder: Path, data: PreparedData, *, source: str = "org/model") -> str:
    settings = {"stage2.samples": 24, "stage2.batch_size": 4, "stage2.loss.gamma": 0.5}
    experiment = replace_in(Experiment(), {**settings, "backbone.source": source})
    metrics = {"HR@1": 0.4, "HR@5": 1.0, "HR@10": 1.0, "tokens_per_second": 30.0, "seconds": 10.0}
    metrics |= {"MRR": 0.5, "targets/all/MRR_low": 0.25, "targets/all/MRR_high": 0.75}
    metrics |= {"targets/never trained on/n": 0.0, "targets/1 to 4 interactions/n": 5.0}
    metrics |= {"targets/1 to 4 interactions/HR@1": 0.4, "targets/1 to 4 interactions/MRR": 0.625}
    metrics |= {"targets/5 to 19 interactions/n": 4.0, "targets/20 interactions or more/n": 1.0}
    with commit_dir(folder / "artifact") as staging:
        write_card(
            staging,
            name="stage-2/0d67",
            experiment=experiment,
            stage="stage2",
            inputs={"backbone": {"source": "beef"}, "recommender": "cafe"},
            start="artifact abcd",
            data=[(data, 10)],
            validation=metrics,
            num_validated=5,
            num_trained=17,
            seconds=12.3,
            precision="fp32",
        )
    assert CARD in manifest(folder / "artifact", verify=True)["files"]
    return (folder / "artifact" / CARD).read_text()


def test_a_card_says_what_was_done(tmp_path: Path, data: PreparedData) -> None:
    text = written(tmp_path, data)
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "org/model",
        "library_name": "peft",
        "license": "other",
        "license_name": "of-backbone-and-data",
        "tags": ["rsllm", "sequential-recommendation", "lora"],
    }, "the hub has no data set of a private folder"
    interval = binomtest(2, 5).proportion_ci(0.95, method="wilson")
    shown = f"| HR@1 | 0.400 [{interval.low:.3f}, {interval.high:.3f}] | 5 |"
    assert shown in text, "2 of 5 validation users"
    for row in (
        "| MRR | 0.500 [0.250, 0.750] | 5 |",
        f"| 1 to 4 interactions | 0.400 [{interval.low:.3f}, {interval.high:.3f}] | 0.625 | 5 |",
        "| 5 to 19 interactions | too few users |  | 4 |",
        "| 20 interactions or more | too few users |  | 1 |",
    ):
        assert row in text
    assert "never trained on" not in text
    for said in (
        "stage 2 on small",
        "after [RSLLM]",
        "title, marker and slot; slots hold vectors of sasrec (cafe)",
        "alpha 0.1",
        "gamma 0.5",
        "samples 24 (4 a step), seed 0, from artifact abcd",
        "12 s, 300 tokens, 17 trained numbers",
        f"prepared as {data.path.name}, 10 users): as its owner states",
        "(beef)",
        'model = rsllm.load("stage-2/0d67")',
    ):
        assert said in text


def test_licences_and_hashes_are_those_of_the_data(
    tmp_path: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = data.facts["inputs"]
    config = inputs["config"] | {"source": "movielens-100k"}
    raw = {"interactions": {"u.data": "06416e"}, "items": {"u.item": "553841"}}
    monkeypatch.setitem(data.facts, "inputs", {**inputs, "config": config, "raw": raw})
    text = written(tmp_path, data, source="smollm2-135m-q4")
    facts = ModelCard(text).data.to_dict()
    assert facts["datasets"] == ["movielens-100k"]
    assert facts["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "research only" in ASSETS["movielens-100k"].licence
    for said in ("research only", "u.data, SHA-256 06416e", "u.item, SHA-256 553841", "Apache-2.0"):
        assert said in text


def test_names_are_inert(
    tmp_path: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = data.facts["inputs"]
    config, raw = inputs["config"] | {"source": HOSTILE}, {"interactions": {HOSTILE: "1"}}
    monkeypatch.setitem(data.facts, "inputs", {**inputs, "config": config, "raw": raw})
    text = written(tmp_path, data, source=HOSTILE)
    facts = ModelCard(text).data.to_dict()
    assert facts["license"] == "other"
    assert "base_model" not in facts, "the hub takes names of its models alone"
    assert "<script" not in text
    assert "](javascript" not in text
    assert text.count("\n---\n") == 1, "where the front matter ends"
