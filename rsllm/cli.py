"""The command line: one verb for each arrow of the pipeline, no logic of its own."""

import argparse
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, get_args

import rsllm
from rsllm.compute.start import quieten
from rsllm.config import Experiment, Precision
from rsllm.config.plain import replace_in
from rsllm.config.stages import RANKERS
from rsllm.errors import ConfigError, RsllmError, did_you_mean, require
from rsllm.flags import (
    add_backbone_flag,
    add_config_flags,
    add_setting_flags,
    add_storage_flag,
    overrides,
    recommend_command,
)
from rsllm.terminal import as_json, notes_on_stderr, say

SAFE_FROM = {
    "torch": ((2, 10), "install 2.10 or newer (CVE-2025-32434, CVE-2026-24747: weights run code)"),
    "ray": ((2, 54), "install 2.54 or newer (CVE-2026-27482: web pages reach the dashboard)"),
}
EXIT_SECONDS = 20.0
"""What Ray has to end after an interruption, which may have come while it held a lock."""
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
SHARE: dict[str, Any] = {"type": float, "metavar": "P", "default": 0.0}
RANKER: dict[str, Any] = {
    "choices": ("auto", *RANKERS),
    "default": "auto",
    "help": "what ranks (default: what is best on validation users, as deployed)",
}
ACTIONS = {
    "ls": "list artifacts, runs that have not ended, and studies",
    "show": "say what decides an artifact, what it was made of, and how good it was",
    "diff": "say what two artifacts differ in",
    "gc": "list or remove what nothing will read again",
}
FIRST = """three commands to begin with:
  rsllm doctor             can this machine run it?
  rsllm start plays.csv    from your own table to recommendations
  rsllm settings           what can be changed"""
EXAMPLES = {
    "fetch": "movielens-100k",
    "synthesize": "world/ --users 200 --items 100",
    "start": "plays.csv --yes",
    "prepare": "--data plays/ --set data.window=20",
    "fit": "--data movielens-100k --recommender sasrec",
    "train": "--config mine.toml --set stage2.samples=512",
    "settings": "stage2.loss",
    "plan": "--backbone Qwen/Qwen3-0.6B --cluster cluster/gpu.yaml",
    "doctor": "--storage rsllm-store",
    "audit": "rsllm-store/data/0d67",
    "evaluate": "--data movielens-100k --predictions scores.csv",
    "recommend": 'stage-2/0d67 --history "Titanic (1997)" --k 5',
    "export": "stage-2/0d67 --as peft --to model/",
    "runs": "show stage-2/0d67",
    "serve": "stage-2/0d67 --port 8000",
    "docs": "--out site/",
    "completion": "bash > ~/.local/share/bash-completion/completions/rsllm",
}
STAGES = {
    "prepare": "turn raw interactions into checked, sharded sequences and candidate sets",
    "fit": "train the recommender whose item embeddings the LLM will read",
    "train": "tune the LLM in two stages",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, the error's own, or 130 (143) after Ctrl-C (SIGTERM)."""
    parser = build_parser()
    arguments = parser.parse_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    return _exit_code(lambda: arguments.run(arguments))


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit; a user's mistake is told in one message, not a traceback."""
    sys.exit(_exit_code(main))


def _exit_code(run: Callable[[], None]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in workers, see `prepare_worker`
    quieten()
    try:
        _refuse_unsafe_libraries()
        run()
    except RsllmError as error:
        print(f"rsllm: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        from rsllm.compute import start

        print("rsllm: interrupted; the same command continues", file=sys.stderr)
        code = start.interrupt_code
        last_resort = threading.Timer(EXIT_SECONDS, os._exit, [code])
        last_resort.daemon = True
        last_resort.start()
        return code
    return 0


def _refuse_unsafe_libraries() -> None:
    """Look at what is installed, however it came there.

    Raises:
        ConfigError: a library that is too old to be safe.
    """
    for library, (floor, remedy) in SAFE_FROM.items():
        found = metadata.version(library)
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < floor:
            raise ConfigError(f"{library} {found} is unsafe; {remedy}")


class _Parser(argparse.ArgumentParser):
    """Proposes the nearest of what it knows for a verb, or another choice, that it does not."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="rsllm",
        description="LLM sequential recommendation, from interactions to results.",
        epilog=FIRST,
        formatter_class=as_written,
    )
    parser.add_argument("--version", action="version", version=f"rsllm {rsllm.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add(verb: str, purpose: str, run: Callable[[argparse.Namespace], None]) -> Any:
        example = f"example: rsllm {verb} {EXAMPLES[verb]}"
        added = verbs.add_parser(
            verb, help=purpose, description=purpose, epilog=example, formatter_class=as_written
        )
        added.set_defaults(run=run, verb=verb)
        return added

    def add_experiment_flags(added: argparse.ArgumentParser) -> None:
        add_setting_flags(added)
        add_storage_flag(added)

    def add_json_flag(added: argparse.ArgumentParser) -> None:
        added.add_argument("--json", action="store_true", help="for programs")

    fetch = add("fetch", "download data sets and backbones, or list them", _fetch)
    fetch.add_argument("names", nargs="*", metavar="NAME", help="asset; lists all without one")
    fetch.add_argument(
        "--from", dest="folder", type=Path, metavar="DIR", help="folder that has the files already"
    )
    add_json_flag(fetch)
    _add_start_flags(add("start", "go from your own table to recommendations", _start))
    _add_world_flags(add("synthesize", "write a world whose best score is known", _synthesize))
    for verb, purpose in STAGES.items():
        add_experiment_flags(add(verb, purpose, _run_stage))
    settings = add("settings", "list every setting: its default, and what it does", _settings)
    about = "beginning of a path, such as stage2.loss; lists all without one"
    settings.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help=about)
    add_json_flag(settings)
    plan = add("plan", "say what training needs, takes and costs, and what fits", _plan)
    add_experiment_flags(plan)
    plan.add_argument("--recommend", metavar="MODEL", help="what lists for all its users take")
    plan.add_argument("--cluster", help="Ray cluster file (default: this machine)", **FILE)
    plan.add_argument(
        "--title-tokens", type=float, default=8.0, metavar="N", help="mean length of a title"
    )
    add_json_flag(plan)
    doctor = add("doctor", "check the installation, and the machine or its cluster", _doctor)
    add_storage_flag(doctor)
    add_backbone_flag(doctor)
    add_json_flag(doctor)
    audit = add("audit", "look for leaks and biases in a prepared data set or a run", _audit)
    audit.add_argument("folder", type=Path, metavar="DIR", help="an artifact, as verbs print them")
    meant = "repeatable: note in the data that what this check finds is meant"
    audit.add_argument("--accept", action="append", default=[], metavar="CHECK", help=meant)
    add_json_flag(audit)
    evaluate = add("evaluate", "judge another system's scores on our candidate sets", _evaluate)
    add_experiment_flags(evaluate)
    evaluate.add_argument("--split", choices=("validation", "test"), default="validation")
    evaluate.add_argument(
        "--predictions",
        **FILE,
        help="CSV or Parquet with user_id, item_id, score and, for several draws, draw",
    )
    evaluate.add_argument("--export", help="write the candidate sets to score instead", **FILE)
    add_json_flag(evaluate)
    recommend = add("recommend", "list items for histories, or everybody", _recommend)
    _add_recommend_flags(recommend)
    add_json_flag(recommend)
    _add_export_flags(add("export", "take a tuned model out of the store, for others", _export))
    runs = add("runs", "list, show, compare and clear what a store holds", _runs)
    actions = runs.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in _add_actions(actions):
        add_json_flag(action)
    _add_serve_flags(add("serve", "answer over HTTP, on Ray Serve", _serve))
    docs = add("docs", "show all pages about rsllm in a browser", _docs)
    docs.add_argument("--out", type=Path, metavar="DIR", help="write them to a new folder instead")
    completion = add("completion", "print what completes verbs and flags in a shell", _completion)
    completion.add_argument("shell", choices=("bash", "zsh"))
    return parser


def _add_actions(actions: Any) -> list[argparse.ArgumentParser]:
    """Add what `runs` does; returns the actions that only look."""
    parsers = [actions.add_parser(name, help=p, description=p) for name, p in ACTIONS.items()]
    for parser in parsers:
        add_storage_flag(parser)
    listed, show, diff, gc = parsers
    name = "KIND/KEY, a key, the beginning of either, or a path"
    show.add_argument("names", nargs=1, metavar="NAME", help=name)
    diff.add_argument("names", nargs=2, metavar="NAME", help=name)
    days = "also what nothing has used for so long"
    gc.add_argument("--older-than", type=float, metavar="DAYS", help=days)
    gc.add_argument("--yes", action="store_true", help="remove it; without, it is listed")
    return [listed, show]


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What is opened, what of it ranks, and how exactly."""
    parser.add_argument("model", metavar="MODEL", help="KIND/KEY of a trained model, or its folder")
    parser.add_argument("--ranker", **RANKER)
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    add_storage_flag(parser)


def _add_recommend_flags(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--history", action="append", metavar="ITEM", help="repeatable: title or id, oldest first"
    )
    who.add_argument("--users", nargs="+", metavar="ID", help="users of the data")
    who.add_argument(
        "--histories", help="CSV or Parquet: user_id, item_id or title, perhaps timestamp", **FILE
    )
    parser.add_argument("--k", type=int, default=10, metavar="N", help="items each (default: 10)")
    parser.add_argument("--out", metavar="PATH", help="file (.csv, .parquet), folder or URI")
    parser.add_argument("--include-seen", action="store_true", help="also items of the history")
    parser.add_argument("--only", help="choose from these items: one a line", **FILE)
    parser.add_argument("--never", help="leave out these items: one a line", **FILE)
    parser.add_argument(
        "--skip-unknown", action="store_true", help="leave out items that the data do not have"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="models side by side")


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="stage-2/KEY, or the beginning of it")
    parser.add_argument("--to", required=True, metavar="DIR|NAME", help="new folder, or hub name")
    forms = {
        "peft": "the adapter apart",
        "merged": "the adapter in the backbone, checked to score the same",
        "hub": "pushed to the Hugging Face hub",
    }
    text = "; ".join(f"{form}: {what}" for form, what in forms.items())
    parser.add_argument("--as", dest="form", choices=[*forms], required=True, help=text)
    parser.add_argument("--ranker", **RANKER)
    titles = "leave titles out; whoever loads it prepares the same data"
    parser.add_argument("--without-titles", action="store_true", help=titles)
    parser.add_argument("--public", action="store_true", help="on the hub; default: private")
    add_storage_flag(parser)


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where it listens (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000)")
    parser.add_argument(
        "--token-file", help="made at the first start without it; open to you alone", **FILE
    )
    parser.add_argument("--certificate", help="of TLS, which other hosts than this need", **FILE)
    parser.add_argument("--key", help="of the certificate", **FILE)
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="models side by side")
    parser.add_argument(
        "--deadline-ms",
        type=int,
        default=1000,
        metavar="N",
        help="after so long the recommender stands in for the language model (default: 1000)",
    )
    parser.add_argument("--against", metavar="MODEL", help="another one, for a share of the users")
    parser.add_argument("--share", help="of the users (default: 0.1)", **(SHARE | {"default": 0.1}))


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="CSV, TSV, JSON or Parquet, or a folder")
    parser.add_argument("--yes", action="store_true", help="do not ask before anything is computed")
    add_backbone_flag(parser)
    add_config_flags(parser)
    add_storage_flag(parser)


def _add_world_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write it")
    parser.add_argument("--users", dest="num_users", type=int, default=1000, metavar="N")
    parser.add_argument("--items", dest="num_items", type=int, default=500, metavar="N")
    parser.add_argument("--length", type=int, default=20, metavar="N", help="steps per user")
    parser.add_argument("--noise", help="share of random steps", **SHARE)
    parser.add_argument("--text-share", help="share of users titles explain", **SHARE)
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def _fetch(arguments: argparse.Namespace) -> None:
    from tabulate import tabulate

    from rsllm.assets import catalogue
    from rsllm.store import artifacts

    fetched = {}
    for name in arguments.names:
        own = catalogue.own_sources(name, arguments.folder) if arguments.folder else ()
        fetched[name] = str(catalogue.fetch(name, sources=own))
        if not arguments.json:
            print(fetched[name])
    known = catalogue.known_assets()
    if arguments.json:
        print(as_json(fetched or known))
    elif not fetched:
        rows = [{**asset, "here": "yes" if asset["here"] else "no"} for asset in known]
        print(f"cache: {artifacts.cache_root()} (RSLLM_CACHE)")
        print(tabulate(rows, "keys", "plain", maxcolwidths=[None] * 4 + [24, 40]))


def _synthesize(arguments: argparse.Namespace) -> None:
    from rsllm.data.synthetic import World, write_world

    how = {field.name: getattr(arguments, field.name) for field in fields(World)}
    write_world(arguments.folder, **how)
    print((arguments.folder / "world.json").read_text().strip())
    print(arguments.folder)


def _audit(arguments: argparse.Namespace) -> None:
    from rsllm.data.audit import accept, audit, refuse_leaks, table

    if arguments.accept:
        accept(arguments.folder, arguments.accept)
    findings = audit(arguments.folder)
    print(as_json(list(map(asdict, findings))) if arguments.json else table(findings))
    refuse_leaks(findings)


def _evaluate(arguments: argparse.Namespace) -> None:
    from rsllm.data.prepared import PreparedData
    from rsllm.pipeline import Pipeline
    from rsllm.report.page import terminal_tables
    from rsllm.store.artifacts import write_json
    from rsllm.study import external

    if not arguments.predictions and not arguments.export:
        raise ConfigError("evaluate needs --predictions FILE, or --export FILE to write the sets")
    found: dict[str, Any] = {}
    with notes_on_stderr(arguments.json):
        pipeline = Pipeline(replace_in(Experiment(), overrides(arguments)), arguments.storage)
        data = PreparedData.open(pipeline.prepare())
        if arguments.export:
            sets = external.export_candidates(data, arguments.split, arguments.export)
            found["candidate sets"] = str(sets)
            print(sets)
        if arguments.predictions:
            path: Path = arguments.predictions
            judged = external.judge(path, data, arguments.split, pipeline.store)
            results = path.with_name(f"{path.stem}-{arguments.split}.json")
            write_json(results, judged)
            found |= judged
            print(f"{terminal_tables(judged)}\n{results}")
    if arguments.json:
        print(as_json(found))


def _start(arguments: argparse.Namespace) -> None:
    from rsllm.start import start

    changes = overrides(arguments)
    if command := start(arguments.file, changes, arguments.storage, sure=arguments.yes):
        recommend = build_parser().parse_args(command)
        recommend.run(recommend)


def _completion(arguments: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(build_parser(), arguments.shell))


def _settings(arguments: argparse.Namespace) -> None:
    from rsllm.settings import settings

    print(settings(arguments.prefix, for_programs=arguments.json))


def _docs(arguments: argparse.Namespace) -> None:
    from rsllm.docs import docs

    docs(arguments.out)


def _plan(arguments: argparse.Namespace) -> None:
    say("rsllm: loading PyTorch")
    from rsllm import plan

    asked = overrides(arguments)
    path: Path | None = arguments.cluster
    if arguments.recommend:
        require(not asked and not path, "give --storage alone beside --recommend MODEL")
        plan.plan_lists(arguments.recommend, arguments.storage, for_programs=arguments.json)
        return
    experiment = replace_in(Experiment(), asked)
    machine = plan.read_cluster(path) if path else plan.this_machine()
    plan.plan(experiment, machine, arguments.title_tokens, for_programs=arguments.json)


def _doctor(arguments: argparse.Namespace) -> None:
    say("rsllm: loading PyTorch and Ray")
    from rsllm import doctor

    checks = doctor.examine(arguments.storage, arguments.backbone)
    doctor.report(checks, for_programs=arguments.json)


def _recommend(arguments: argparse.Namespace) -> None:
    say("rsllm: loading PyTorch")
    from rsllm.recommend.recommend import recommend

    recommend(arguments)


def _export(arguments: argparse.Namespace) -> None:
    from rsllm.export import export

    print(
        export(
            arguments.name,
            arguments.to,
            arguments.form,
            storage=arguments.storage,
            ranker=arguments.ranker,
            titles=not arguments.without_titles,
            public=arguments.public,
        )
    )


def _serve(arguments: argparse.Namespace) -> None:
    from rsllm.serve.serve import serve

    serve(arguments)


def _runs(arguments: argparse.Namespace) -> None:
    from rsllm import runs
    from rsllm.store.artifacts import Store

    store = Store.at(arguments.storage)
    match arguments.action:
        case "ls" if arguments.json:
            found = runs.contents(store)
            print(as_json({**found, "artifacts": [*map(asdict, found["artifacts"])]}))
        case "ls":
            print(runs.listing(store))
        case "show" if arguments.json:
            artifact = runs.find(runs.read_artifacts(store), arguments.names[0], store)
            print(as_json(asdict(artifact)))
        case "show":
            print(runs.details(store, *arguments.names))
        case "diff":
            print(runs.difference(store, *arguments.names))
        case _:
            print(runs.clear(store, days=arguments.older_than, remove=arguments.yes))


def _run_stage(arguments: argparse.Namespace) -> None:
    from rsllm.pipeline import Pipeline

    experiment = replace_in(Experiment(), overrides(arguments))
    path = getattr(Pipeline(experiment, arguments.storage), arguments.verb)()
    if arguments.verb == "fit":
        _print_fit(path)
    if arguments.verb != "prepare":
        # Standard output is for programs: it ends in the path.
        print("a list for every user:", recommend_command(path, arguments.storage), file=sys.stderr)
    print(path)


def _print_fit(folder: Path) -> None:
    """How good the recommender is, and how much surer it is of rows that it trained on."""
    from rsllm.recommenders import SEEN
    from rsllm.store.artifacts import read_json

    curve, seen = read_json(folder / "training.json")["curve"], read_json(folder / SEEN)
    best = max(curve, key=lambda entry: entry["MRR"])
    for metric, value in seen.items():
        print(f"{metric:8}{best[metric]:.3f} on validation, {value:.3f} on training rows")
