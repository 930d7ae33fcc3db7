"""The command line: one verb for each arrow of the pipeline, no logic of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rsllm
from rsllm.config import Experiment, parse_setting, replace_in
from rsllm.errors import RsllmError

STAGES = {
    "prepare": "turn raw interactions into checked, sharded sequences",
    "fit": "train the recommender whose item embeddings the LLM will read",
    "train": "tune the LLM in two stages",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, the error's own, or 130 after an interrupt."""
    arguments = build_parser().parse_args(argv)
    return _exit_code(lambda: arguments.run(arguments))


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit; a user's mistake is told in one message, not a traceback."""
    sys.exit(_exit_code(main))


def _exit_code(run: Callable[[], None]) -> int:
    try:
        run()
    except RsllmError as error:
        print(f"rsllm: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("rsllm: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    parser = argparse.ArgumentParser(
        prog="rsllm", description="LLM sequential recommendation, from interactions to results."
    )
    parser.add_argument("--version", action="version", version=f"rsllm {rsllm.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    fetch = verbs.add_parser("fetch", help="download data sets and backbones, or list them")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="asset; lists all without one")
    fetch.set_defaults(run=_fetch)
    for verb, purpose in STAGES.items():
        _add_experiment_flags(verbs.add_parser(verb, help=purpose, description=purpose), verb)
    return parser


def _add_experiment_flags(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("--data", metavar="SOURCE", help="data set name or folder (data.source)")
    parser.add_argument(
        "--backbone", metavar="SOURCE", help="asset, folder or hub name (backbone.source)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="any setting, such as stage2.loss.alpha=0.1; the value is JSON or plain text",
    )
    parser.add_argument(
        "--storage",
        type=Path,
        default=Path("rsllm-store"),
        metavar="DIR",
        help="folder of all artifacts (default: %(default)s)",
    )
    parser.set_defaults(run=_run_stage, verb=verb)


def _fetch(arguments: argparse.Namespace) -> None:
    from rsllm import assets

    for name in arguments.names:
        print(assets.fetch(name))
    if not arguments.names:
        print(f"cache: {assets.cache_root()} (RSLLM_CACHE)")
        for name, asset in assets.ASSETS.items():
            print(f"{name:16}  {asset.kind:8}  {asset.licence}")


def _run_stage(arguments: argparse.Namespace) -> None:
    from rsllm.pipeline import Pipeline

    experiment = replace_in(Experiment(), _overrides(arguments))
    print(getattr(Pipeline(experiment, arguments.storage), arguments.verb)())


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = dict(map(parse_setting, arguments.set))
    named = {"data.source": arguments.data, "backbone.source": arguments.backbone}
    return overrides | {path: value for path, value in named.items() if value is not None}
