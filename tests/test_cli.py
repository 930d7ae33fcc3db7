"""The command line: a frozen set of verbs and flags, light to load, kind to a user's mistakes."""

from __future__ import annotations

import argparse
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rsllm
from rsllm import cli
from rsllm.cli import EXAMPLES, _print_fit, build_parser, main, run_script
from rsllm.config import Experiment
from rsllm.config.plain import replace_in, to_dict
from rsllm.config.presets import preset
from rsllm.errors import DataError
from rsllm.store.artifacts import write_json

EXPERIMENT_FLAGS = ["--backbone", "--config", "--data", "--layout", "--like", "--recommender"]
EXPERIMENT_FLAGS += ["--set", "--storage"]
GOLDEN = {
    "fetch": ["--from", "--json", "NAME"],
    "start": ["--backbone", "--config", "--like", "--set", "--storage", "--yes", "FILE"],
    "completion": ["None"],
    "docs": ["--out"],
    "synthesize": ["--items", "--length", "--noise", "--seed", "--text-share", "--users", "DIR"],
    "prepare": EXPERIMENT_FLAGS,
    "fit": EXPERIMENT_FLAGS,
    "train": EXPERIMENT_FLAGS,
    "settings": ["--json", "PREFIX"],
    "plan": sorted([*EXPERIMENT_FLAGS, "--cluster", "--json", "--recommend", "--title-tokens"]),
    "doctor": ["--backbone", "--json", "--storage"],
    "audit": ["--accept", "--json", "DIR"],
    "evaluate": sorted([*EXPERIMENT_FLAGS, "--export", "--json", "--predictions", "--split"]),
    "serve": sorted(
        [
            *("--host", "--port", "--token-file", "--certificate", "--key", "--ranker"),
            *("--precision", "--replicas", "--deadline-ms", "--against", "--share", "--storage"),
            "MODEL",
        ]
    ),
    "recommend": sorted(
        [
            *("--history", "--users", "--histories", "--k", "--out", "--ranker", "--workers"),
            *("--include-seen", "--only", "--never", "--skip-unknown", "--precision", "--storage"),
            *("--json", "MODEL"),
        ]
    ),
    "export": ["--as", "--public", "--ranker", "--storage", "--to", "--without-titles", "NAME"],
    "runs ls": ["--json", "--storage"],
    "runs show": ["--json", "--storage", "NAME"],
    "runs diff": ["--storage", "NAME"],
    "runs gc": ["--older-than", "--storage", "--yes"],
}


def flags(parser: argparse.ArgumentParser) -> list[str]:
    names = [
        action.option_strings[-1] if action.option_strings else str(action.metavar)
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]
    return sorted(names)


def choices(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Verbs, and those of verbs, with their parsers."""
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for verb, choice in verbs.choices.items():
        if any(isinstance(a, argparse._SubParsersAction) for a in choice._actions):
            assert flags(choice) == []
            yield from ((f"{verb} {below}", more) for below, more in choices(choice))
        else:
            yield verb, choice


def test_fit_says_how_much_surer_it_is_of_training_rows(
    tmp_path: Path, runs: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    curve = [{"MRR": 0.4, "HR@1": 0.3}, {"MRR": 0.6, "HR@1": 0.5}, {"MRR": 0.5, "HR@1": 0.6}]
    (tmp_path / "artifact").mkdir()
    write_json(tmp_path / "artifact" / "training.json", {"curve": curve})
    write_json(tmp_path / "artifact" / "seen.json", {"HR@1": 0.75})
    assert main(["fit", "--recommender", "caser", "--set", "recommender.width=16"]) == 0
    ((verb, experiment, _),) = runs
    assert (verb, experiment.recommender.model, experiment.recommender.width) == (
        "fit",
        "caser",
        16,
    )
    shown = capsys.readouterr()
    assert shown.out == "HR@1    0.500 on validation, 0.750 on training rows\nartifact\n"
    assert "rsllm recommend artifact --out lists.csv\n" in shown.err


def test_verbs_and_flags_are_frozen() -> None:
    parser = build_parser()
    assert flags(parser) == ["--version"]
    assert {verb: flags(choice) for verb, choice in choices(parser)} == GOLDEN


@pytest.mark.parametrize(
    "code",
    ["import rsllm; rsllm.Experiment", "from rsllm.cli import main; main(['--help'])"],
    ids=["import", "help"],
)
def test_import_and_help_are_light(code: str) -> None:
    report = (
        "import atexit, sys\n"
        "atexit.register(lambda: sys.stderr.write(' '.join({'torch', 'ray', 'transformers', "
        "'numpy', 'pandas', 'httpx'} & sys.modules.keys())))\n"
    )
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True)
        seconds.append(processor_seconds() - start)
        assert (done.returncode, done.stderr) == (0, "")
    assert min(seconds) <= 0.5


def processor_seconds() -> float:
    """Of all ended children: what others run on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"rsllm {rsllm.__version__}\n"


def test_fetch_lists_assets_licences_and_the_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path))
    assert main(["fetch"]) == 0
    listing = capsys.readouterr().out
    for part in (str(tmp_path), "movielens-100k", "no redistribution", "smollm2-135m-q4"):
        assert part in listing


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Puts a pipeline that only records its calls in the place of the real one."""
    calls: list[Any] = []

    class Recorder:
        def __init__(self, experiment: Experiment, storage: str) -> None:
            self.call = (experiment, storage)

        def __getattr__(self, verb: str) -> Any:
            return lambda: calls.append((verb, *self.call)) or Path("artifact")

    module = ModuleType("rsllm.pipeline")
    module.Pipeline = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rsllm.pipeline", module)
    return calls


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_verb_runs_its_stage_on_the_default_experiment(
    verb: str, runs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb]) == 0
    assert runs == [(verb, Experiment(), "rsllm-store")]
    assert capsys.readouterr().out == "artifact\n"


def test_on_a_cluster_the_storage_is_the_clusters(
    runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSLLM_STORAGE", "/mnt/rsllm/store")
    assert main(["prepare"]) == main(["prepare", "--storage", "mine"]) == 0
    assert [storage for _, _, storage in runs] == ["/mnt/rsllm/store", "mine"]


def test_flags_become_settings(runs: list[Any]) -> None:
    arguments = [
        "--set",
        "stage2.samples=16",
        "--set",
        "data.train_share=0.5",
        "--data",
        "synthetic",
    ]
    arguments += ["--set", 'backbone.lora_targets=["q_proj"]', "--backbone", "org/name"]
    assert (
        main(["train", *arguments, "--set", "stage1.representation=text", "--storage", "/s"]) == 0
    )
    expected = {
        "stage2.samples": 16,
        "data.train_share": 0.5,
        "data.source": "synthetic",
        "backbone.lora_targets": ["q_proj"],
        "backbone.source": "org/name",
    }
    assert runs == [("train", replace_in(Experiment(), expected), "/s")]


def test_a_recommender_comes_with_its_tuned_settings(runs: list[Any]) -> None:
    """Those given beside it win."""
    arguments = ["--recommender", "caser", "--set", "recommender.width=24"]
    assert main(["train", *arguments, "--data", "synthetic"]) == 0
    tuned = preset("caser", "synthetic")
    expected = tuned | {"data.source": "synthetic", "recommender.width": 24}
    assert runs == [("train", replace_in(Experiment(), expected), "rsllm-store")]
    assert runs[0][1].recommender.model == "caser"


def test_fit_prints_the_best_validation_beside_training_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = [{"MRR": mrr, "HR@1": 0.5 - mrr, "step": 1.0} for mrr in (0.25, 0.375, 0.125)]
    write_json(tmp_path / "training.json", {"curve": curve})
    write_json(tmp_path / "seen.json", {"HR@1": 0.5, "MRR": 0.75})
    _print_fit(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "HR@1    0.125 on validation, 0.500 on training rows",
        "MRR     0.375 on validation, 0.750 on training rows",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "movielens"], "choose one of movielens-100k"),
        (["evaluate"], "needs --predictions FILE, or --export FILE"),
        (["train", "--recommender", "bert4rec"], "choose one of gru4rec, caser, sasrec"),
        (["train", "--set", "seed"], "not of the form PATH=VALUE"),
        (["train", "--set", "data.colour=1"], "no setting 'data.colour'"),
        (["train", "--set", "data.window=ten"], "valid integer"),
        (["train", "--set", "data.window=0"], "greater than 0"),
    ],
)
def test_a_users_mistake_is_one_message(
    arguments: list[str], message: str, runs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rsllm: error: ")
    assert message in error
    assert runs == []


def test_script_exits_with_the_errors_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "EXIT_SECONDS", 1e6)  # of this process, which goes on

    def fail() -> None:
        raise DataError("no ratings")

    def interrupt() -> None:
        raise KeyboardInterrupt

    for script, code in ((fail, 1), (interrupt, 130), (lambda: None, 0)):
        with pytest.raises(SystemExit) as stop:
            run_script(script)
        assert stop.value.code == code
    assert capsys.readouterr().err.splitlines() == [
        "rsllm: error: no ratings",
        "rsllm: interrupted; the same command continues",
    ]


@pytest.mark.parametrize(
    "stuck", ["atexit.register(time.sleep, 600)", "Thread(target=wait).start()"]
)
def test_an_interrupted_script_ends_even_if_something_hangs(stuck: str) -> None:
    code = f"""
import atexit, time
from threading import Thread
from rsllm import cli
cli.EXIT_SECONDS = 0.5
wait = lambda: time.sleep(600)
def main():
    {stuck}
    raise KeyboardInterrupt
cli.run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "rsllm: interrupted; the same command continues\n"


def test_public_names_are_importable_and_others_refused() -> None:
    assert rsllm.Experiment is Experiment
    assert rsllm.replace_in is replace_in
    assert set(rsllm.__all__) <= set(dir(rsllm))
    with pytest.raises(AttributeError, match="Experimnt"):
        rsllm.Experimnt  # noqa: B018


def test_without_a_verb_the_first_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"rsllm {first}" in shown for first in ("doctor", "start plays.csv", "settings"))


def test_the_nearest_verb_and_choice_are_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    for words, nearest in ((["prepar"], "prepare"), (["completion", "bsh"], "bash")):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert capsys.readouterr().err.strip().endswith(f"did you mean '{nearest}'?")


def test_every_verb_has_an_example_that_can_be_typed() -> None:
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(verbs.choices) == set(EXAMPLES)
    for verb, example in EXAMPLES.items():
        words = shlex.split(example.partition(" > ")[0])
        assert build_parser().parse_args([verb, *words]).verb == verb
        assert f"\nexample: rsllm {verb} {example}\n" in verbs.choices[verb].format_help()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "recommend" in script
    assert "--config" in script
    if there := shutil.which(shell):
        subprocess.run([there, "-n"], input=script, text=True, check=True)


def test_a_file_of_settings_wins_over_presets_and_set_wins_over_it(
    runs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'data.source = "synthetic"\n[recommender]\nwidth = 16\n[stage2]\nsamples = 8\n'
        "[stage2.loss]\nalpha = 0.25\n"
    )
    words = ["--config", str(file), "--recommender", "caser", "--set", "stage2.samples=24"]
    assert main(["train", *words]) == 0
    changes = {"data.source": "synthetic", "recommender.width": 16}
    changes |= {"stage2.samples": 24, "stage2.loss.alpha": 0.25}
    ((_, experiment, _),) = runs
    assert experiment == replace_in(Experiment(), preset("caser", "") | changes)
    file.write_text("stage2.sample = 8\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "did you mean 'stage2.samples'?" in capsys.readouterr().err
    file.write_text("stage2: 8\n")
    assert main(["train", "--config", str(file)]) == 2
    assert f"--config {file} cannot be read as TOML" in capsys.readouterr().err


def test_a_study_gives_its_settings(runs: list[Any], tmp_path: Path) -> None:
    study = tmp_path / "studies" / "tune-1"
    study.mkdir(parents=True)
    changed = replace_in(Experiment(), {"data.window": 7, "stage2.samples": 8})
    write_json(study / "results.json", {"experiment": to_dict(changed)})
    for name in ("tune-1", str(study)):
        words = ["train", "--like", name, "--storage", str(tmp_path), "--set", "data.window=9"]
        assert main(words) == 0
    expected = replace_in(changed, {"data.window": 9})
    assert [experiment for _, experiment, _ in runs] == [expected, expected]
