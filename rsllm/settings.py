"""`rsllm settings`: every setting there is, and those that an artifact was made with."""

import ast
import inspect
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from tabulate import tabulate

from rsllm import config
from rsllm.assets.catalogue import base_of
from rsllm.config import Experiment, TableConfig
from rsllm.config.plain import flat, to_dict
from rsllm.errors import ConfigError, did_you_mean, require
from rsllm.runs import find, read_artifacts
from rsllm.store.artifacts import MANIFEST, Store, manifest, read_json
from rsllm.terminal import as_json

WIDTH = 60
RESULTS = "results.json"
SOURCES = {"data": ("data",), "start": ("stage-1",), "recommender": ("recommender", "items")}
"""The inputs of an artifact that are artifacts with settings, and the kinds that they may be."""
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class Setting(NamedTuple):
    """One setting, as `--set PATH=VALUE` takes it."""

    path: str
    default: Any
    choices: str
    """What it may be: its values, or a type and bounds."""
    about: str


def all_settings() -> list[Setting]:
    """Every setting of an `Experiment`, in the order of its dataclasses."""
    schema = TypeAdapter(Experiment).json_schema()
    defaults = dict(flat(to_dict(Experiment())))
    return [
        Setting(path, defaults.get(path), _choices(facts), about)
        for path, facts, about in _fields(schema, "Experiment", schema["$defs"])
    ]


def _fields(
    schema: dict[str, Any], name: str, sections: dict[str, Any], above: str = ""
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each field's path, facts and docstring, section by section."""
    docs = _docstrings(getattr(config, name))
    for field, facts in schema["properties"].items():
        section = facts.get("$ref", "").rpartition("/")[2]
        if section:
            yield from _fields(sections[section], section, sections, f"{above}{field}.")
        else:
            yield f"{above}{field}", facts, docs.get(field, "")


def _docstrings(section: type) -> dict[str, str]:
    """The strings below a dataclass' fields, which only its source has."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(ast.literal_eval(below.value).split())
        for field, below in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def _choices(facts: dict[str, Any]) -> str:
    if "enum" in facts:
        return ", ".join(map(str, facts["enum"]))
    several = facts.get("anyOf")
    if several:
        return " or ".join(_choices(one) for one in several)
    bounds = [f"{sign} {facts[name]:g}" for name, sign in BOUNDS.items() if name in facts]
    return " ".join([str(facts.get("type", facts.get("const", "any"))), *bounds])


def settings_like(name: str, storage: str | Path) -> dict[str, Any]:
    """The settings behind a study or an artifact, by dotted paths.

    A study knows all of them, an artifact those that decide it and what it was made from.

    Args:
        name: KIND/KEY, the beginning of it, the name of a study, or a folder.
        storage: where it is looked for, unless it is a folder.

    Raises:
        ConfigError: there is none of this name, or further data sets decide it.
    """
    store, path = Store.at(storage), Path(name)
    for study in (path, store.root / "studies" / path.name):
        if (study / RESULTS).exists():
            return dict(flat(read_json(study / RESULTS)["experiment"]))
    if not (path / MANIFEST).exists():
        path = store.local(store.root / find(read_artifacts(store), name, store).name)
    return dict(flat(_sections(path)))


def _sections(folder: Path) -> dict[str, Any]:
    """The sections of an `Experiment` that an artifact, or what it was made from, names."""
    facts, found = manifest(folder), dict[str, Any]()
    kind, inputs = facts["kind"], facts["inputs"]
    require(not inputs.get("mixture"), f"{folder} has further data sets; --like cannot name them")
    for source, kinds in SOURCES.items():
        if isinstance(key := inputs.get(source), str):
            paths = [p for of in kinds if (p := folder.parents[1] / of / key).is_dir()]
            require(bool(paths), f"{folder} was made from {kinds[0]}/{key}, which is not here")
            found |= _sections(paths[0])
    named = ("backbone", "prompt", "projector", "catalogue", "recommender")
    found |= {part: dict(inputs[part]) for part in named if isinstance(inputs.get(part), dict)}
    found.get("prompt", {}).pop("wording", None)
    if kind == "data":
        found["data"] = {**inputs["config"], "table": _columns(inputs["config"]["table"])}
    elif kind == "items":
        found["recommender"] |= {"folds": len(inputs["folds"])}
    elif "stage" in inputs:
        found |= {kind.replace("-", ""): inputs["stage"]}
        found |= {} if kind == "stage-1" or inputs.get("start") else {"stage1": {"samples": 0}}
        found["evaluation"] = {"validation_rows": inputs["validation_rows"]}
        del found["backbone"]["source"]  # its content, which is no name
        if base := base_of(folder):
            found["backbone"]["source"] = base
    return found


def _columns(table: Mapping[str, Any]) -> dict[str, str]:
    """The columns of own data, by role; what else was found in its files is found again."""
    columns = dict(table["interactions"]["columns"]) if "interactions" in table else {}
    return {role: column for role, column in columns.items() if hasattr(TableConfig, role)}


def settings(prefix: str = "", *, for_programs: bool = False) -> str:
    """A table, or JSON, of the settings whose paths begin with a prefix, or else hold it.

    Raises:
        ConfigError: there is none.
    """
    every = all_settings()
    chosen = [one for one in every if one.path.startswith(prefix)]
    chosen = chosen or [one for one in every if prefix in one.path]
    if not chosen:
        hint = did_you_mean(prefix, [one.path for one in every])
        raise ConfigError(f"no setting is called {prefix!r}{hint}")
    if for_programs:
        return as_json([one._asdict() for one in chosen])
    rows = [(one.path, one.default, one.choices, one.about) for one in chosen]
    header, widths = ["--set", "default", "may be", "what it does"], [None, 16, 24, WIDTH]
    return tabulate(rows, header, maxcolwidths=widths, disable_numparse=True)
