"""Fixtures shared by all tests: real files where they exist, tiny models, one local Ray."""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

pytest_plugins = ["skips"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the models are too small for two
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",  # Ray's exporter has crashed a process that had it
}


def pytest_configure(config: pytest.Config) -> None:
    """Set what Ray and transformers read at import; subprocesses inherit it."""
    folder = tempfile.TemporaryDirectory(prefix="rsllm-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=folder.name)  # apart from the user's own Ray
    settings.register_profile("any machine", deadline=None)  # a busy one is no failure
    settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of Ray come first: they take longest."""
    items.sort(key=lambda item: not _asks_ray(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, one has all files with tests of Ray, the others a file each.

    Tests of Ray mostly wait, and share one Ray: two side by side would be in each other's way.
    """
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class OneOfRay(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "Ray" if _asks_ray(config.rootpath / file) else file

    return OneOfRay(config, log)


@functools.cache
def _asks_ray(path: Path) -> bool:
    return "mark.ray" in path.read_text()


@pytest.fixture(scope="session")
def assets() -> Path | None:
    """The folder of real files, or None: then a test makes up its own data."""
    value = os.environ.get("RSLLM_TEST_ASSETS")
    if value is None:
        return None
    path = Path(value)
    if not path.is_dir():
        raise pytest.UsageError(f"RSLLM_TEST_ASSETS={value} is no folder; correct or unset it")
    return path


@pytest.fixture(scope="session")
def tiny_llm(assets: Path | None, request: pytest.FixtureRequest) -> Path:
    """Folder of a trained 260k-parameter Llama, or of `random_llm` where the files are missing."""
    trained = assets / "models" / "stories260k" if assets else None
    if trained and trained.is_dir():
        return trained
    path: Path = request.getfixturevalue("random_llm")
    return path


@pytest.fixture(scope="session")
def random_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Llama with a byte-level BPE and SmolLM2's special tokens."""
    folder = tmp_path_factory.mktemp("random_llm")
    _save_model(folder, vocab_size=_save_tokenizer(folder))
    return folder


def _save_tokenizer(folder: Path) -> int:
    """Train and save the tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    ).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def _sentences() -> Iterator[str]:
    adjectives = ("Last", "Quiet", "Golden", "Broken", "Secret", "Winter")
    nouns = ("Matrix", "Garden", "Voyage", "Letter", "Harbor", "Orchestra")
    for adjective, noun in itertools.product(adjectives, nouns):
        yield f"The {adjective} {noun} (1996)"
        yield f"This user has watched The {noun} before.\nThe next movie is {adjective} {noun}."


def _save_model(folder: Path, vocab_size: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket, seen from node a; subprocesses see it too."""
    import object_store

    object_store.register()
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "node-a"))
    monkeypatch.setenv(object_store.LOG, str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", object_store.search_path(tmp_path / "driver"))
    return f"objects://{tmp_path}/bucket"


@pytest.fixture
def go_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this process one of another node."""
    return lambda node: monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / node))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray with two CPUs and a dashboard on loopback; yields the dashboard's address."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        object_store_memory=300 * 1024**2,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def main_job(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The main job, finished after an interruption and a kill: `jobs.Finished`."""
    import jobs

    return jobs.finished(tiny_llm, tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def trained_here(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages train in this process, one after the other, and none starts the four of Ray Train.

    For what is asked of the outcome. How trainings fare in processes of their own is asked in
    test_main_job.py, test_search.py and the faults.
    """
    from world import group_of_one

    from rsllm.study import variants
    from rsllm.train import launch
    from rsllm.train.worker import work

    with group_of_one(tmp_path_factory.mktemp("group")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", lambda assignment, **named: work({"assignment": assignment}))
        patch.setattr("ray.train.report", lambda metrics: None)
        patch.setattr(variants, "run_all", lambda pipelines: None)  # what it left out is run next
        yield
