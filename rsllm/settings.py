"""`rsllm settings`: every setting there is, with its default, what it may be, and what it does."""

import ast
import inspect
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from tabulate import tabulate

from rsllm import config
from rsllm.config import Experiment
from rsllm.config.plain import flat, to_dict
from rsllm.errors import ConfigError, did_you_mean

WIDTH = 60
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


def settings(prefix: str = "", *, as_json: bool = False) -> str:
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
    if as_json:
        return json.dumps([one._asdict() for one in chosen], indent=1)
    rows = [(one.path, one.default, one.choices, one.about) for one in chosen]
    header, widths = ["--set", "default", "may be", "what it does"], [None, 16, 24, WIDTH]
    return tabulate(rows, header, maxcolwidths=widths, disable_numparse=True)
