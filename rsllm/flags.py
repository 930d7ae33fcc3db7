"""Flags that set an experiment, and the command line that every experiment script shares."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsllm.compute.start import start_ray
from rsllm.config import Experiment
from rsllm.config.models import RECOMMENDERS
from rsllm.config.plain import content_hash, parse_setting, read_settings, replace_in, to_dict
from rsllm.errors import ConfigError
from rsllm.store.artifacts import Store

if TYPE_CHECKING:
    from rsllm.train.assignment import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much is spent: paths into `Experiment`, and the number of trials."""

    summary: str
    """One line for `--help`, with the time it took and on what."""
    trials: int = 0
    """0: there is no search."""
    confirm_top: int = 1
    """The best trials of a search that are trained anew on fresh seeds."""
    seeds: int = 0
    """How many all that is compared is trained on; 0: nothing is."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    twin_overrides: Mapping[str, Any] = field(default_factory=dict)
    """The same for the twins of the winner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """The experiment that the user chose, and how much is spent on it."""

    budget: Budget
    budget_name: str
    experiment: Experiment
    """The base experiment under this budget and the user's own settings."""
    storage: str
    trials: int
    seeds: int
    seed: int
    search: Mapping[str, Any]
    """Keywords of `Search`: where it keeps its trials, and where it logs them too."""
    only: tuple[str, ...]
    """Names of the variants that were asked for; empty leaves the choice to the script."""

    def named(self, title: str) -> str:
        """A name of a search: other settings (where it runs is none) or seeds give another one."""
        return f"{title}-{content_hash([to_dict(self.experiment.anywhere), self.seed])}"


FLAGS = {
    "data": "data.source",
    "layout": "data.layout",
    "backbone": "backbone.source",
    "recommender": "recommender.model",
    "workers": "compute.workers",
    "zero_stage": "compute.zero_stage",
}
"""Flags that stand for a setting."""
SEARCH = ("optuna_storage", "track")


def add_setting_flags(parser: argparse.ArgumentParser, data_sets: Sequence[str] = ()) -> None:
    """The flags by which scripts and verbs alike change an `Experiment`; see `overrides`.

    Where a script has data sets of its own, --data chooses among them, again and again.
    """
    about = "data set name, or a folder of raw files"
    if data_sets:
        about = f"repeatable (default: {'; '.join(data_sets)}), or another {about}"
    action = "append" if data_sets else "store"
    parser.add_argument("--data", metavar="SOURCE", action=action, help=about)
    parser.add_argument("--layout", metavar="FILE", help="TOML that describes the raw files")
    add_backbone_flag(parser)
    parser.add_argument(
        "--recommender",
        metavar="MODEL",
        help=f"as tuned for the data: {', '.join(RECOMMENDERS)}",
    )
    add_config_flags(parser)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """--set, --config and --like, each of which wins over the next."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="any setting, such as stage2.loss.alpha=0.1; the value is JSON or plain text",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML with settings, by the same names"
    )
    like = "start from the settings of a study or an artifact (KIND/KEY, or its folder)"
    parser.add_argument("--like", metavar="ARTIFACT", help=like)


def add_backbone_flag(parser: argparse.ArgumentParser) -> None:
    """--backbone."""
    parser.add_argument("--backbone", metavar="SOURCE", help="asset, model folder or hub name")


def add_storage_flag(parser: argparse.ArgumentParser) -> None:
    """--storage, for verbs and scripts alike."""
    parser.add_argument(
        "--storage",
        default=_usual_storage(),
        metavar="DIR|URI",
        help="all artifacts and results: a folder that every node sees, or a URI, such as"
        " s3://bucket/path (RSLLM_STORAGE; default: rsllm-store)",
    )


def _usual_storage() -> str:
    return os.environ.get("RSLLM_STORAGE") or "rsllm-store"


def recommend_command(model: Path, storage: str, *asked: str) -> str:
    """What to type here to get lists by a model of a storage, for every user unless told."""
    program = "rsllm"
    if not shutil.which(program):  # its environment is not activated, as after `make tune`
        program = os.path.relpath(Path(sys.executable).with_name(program))
    store, usual = Store.at(storage), Store.at(_usual_storage())
    where = [] if store == usual else ["--storage", store.location]
    where += asked or ("--out", "lists.csv")
    return shlex.join([program, "recommend", store.name(model), *where])


def overrides(values: argparse.Namespace) -> dict[str, Any]:
    """What the flags set, by paths.

    `FLAGS` win over `--set`, then come `--config`, what a recommender was tuned to, and `--like`.
    """
    given = {path: getattr(values, flag, None) for flag, path in FLAGS.items()}
    named = {path: value for path, value in given.items() if value is not None}
    found: dict[str, Any] = {}
    if values.like:
        from rsllm.settings import settings_like

        found |= settings_like(values.like, values.storage)
    if model := named.get("recommender.model"):
        from rsllm.config.presets import preset

        found |= preset(model, str(named.get("data.source", "")))
    if values.config:
        found |= read_settings(values.config)
    return found | dict(map(parse_setting, values.set)) | named


def parse(
    description: str,
    budgets: Mapping[str, Budget],
    base: Experiment,
    watched: Stage = "stage2",
    variants: Sequence[str] = (),
) -> Arguments:
    """Read flags, and for those that are absent `RSLLM_BUDGET` and `RSLLM_STORAGE`.

    Settings, storage and sources are checked before Ray is started to look for GPUs.

    Raises:
        ConfigError: a value that cannot work.
    """
    from rsllm.pipeline import Pipeline

    unasked = argparse.Namespace(trials=None, seeds=None, seed=0, **dict.fromkeys(SEARCH, ""))
    values = make_parser(description, budgets, variants).parse_args(namespace=unasked)
    name, storage = budget_and_storage(values, budgets)
    asked = overrides(values)
    Pipeline(replace_in(base, asked), storage, watched=watched).check()
    name = name or default_budget(budgets)
    budget = budgets[name]
    return Arguments(
        budget=budget,
        budget_name=name,
        experiment=replace_in(base, {**budget.overrides, **asked}),
        storage=storage,
        trials=values.trials or budget.trials,
        seeds=values.seeds or budget.seeds,
        seed=values.seed,
        search={name: getattr(values, name) for name in SEARCH},
        only=tuple(values.only or ()) if variants else (),
    )


def budget_and_storage(
    values: argparse.Namespace, budgets: Mapping[str, Budget]
) -> tuple[str, str]:
    """The budget that was asked for (perhaps none) and the storage.

    Raises:
        ConfigError: an unknown budget, or no trial or seed.
    """
    name = values.budget or os.environ.get("RSLLM_BUDGET") or ""
    if name and name not in budgets:
        raise ConfigError(f"budget {name!r} is unknown; choose one of {list(budgets)}")
    for flag, count in {"trials": values.trials, "seeds": values.seeds}.items():
        if count is not None and count < 1:
            raise ConfigError(f"--{flag} is {count}; a study needs at least 1")
    return name, values.storage or "rsllm-store"


def default_budget(budgets: Mapping[str, Budget]) -> str:
    """The last budget (the full one) where a GPU is in reach, else the first."""
    import ray

    start_ray()
    return list(budgets)[-1 if ray.cluster_resources().get("GPU", 0) else 0]


def make_parser(
    description: str,
    budgets: Mapping[str, Budget],
    variants: Sequence[str] = (),
    data_sets: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """The flags that all scripts share, and those of what the budgets and variants ask for."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,  # --seed is not short for --seeds
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="budgets:\n"
        + "\n".join(f"  {name:8}{budget.summary}" for name, budget in budgets.items())
        + "\n\nResume: give the same command again after an interruption. What is finished is found"
        "\nin the storage folder; nothing is computed twice.",
    )
    parser.add_argument(
        "--budget", help="see below (RSLLM_BUDGET; default: the last with a GPU, else the first)"
    )
    if any(budget.trials for budget in budgets.values()):
        parser.add_argument("--trials", type=int, help="number of trials, instead of the budget's")
        parser.add_argument("--seed", type=int, help="seed of the search (default: 0)")
        parser.add_argument("--optuna-storage", metavar="URL", help="database in place of a file")
        parser.add_argument("--track", choices=("mlflow", "wandb"), help="log trials there too")
    if any(budget.seeds for budget in budgets.values()):
        parser.add_argument("--seeds", type=int, help="seeds to train all that is compared on")
    if variants:
        parser.add_argument(
            "--only", choices=variants, action="append", metavar="NAME", help="; ".join(variants)
        )
    add_setting_flags(parser, data_sets)
    parser.add_argument("--workers", type=int, help="data-parallel workers per trial")
    parser.add_argument("--zero-stage", type=int, help="DeepSpeed ZeRO stage, 0 to 3")
    add_storage_flag(parser)
    return parser
