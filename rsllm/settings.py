"""Config dataclasses as plain data: JSON round trip, dotted paths, `--set`, content hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from rsllm.errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON-ready form of a config dataclass."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a config dataclass from `to_dict`'s form.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {sorted(hints)}")
    return cls(**{key: _coerce(hints[key], value, key) for key, value in values.items()})


def _coerce(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; it is a group of settings: set one of them")
        return from_dict(hint, value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} is {value!r}; choose one of {list(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f'{name} is {value!r}; expected a list, such as ["q_proj"]')
        kind = get_args(hint)[0]
        return tuple(_coerce(kind, part, f"{name}[{i}]") for i, part in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} is {value!r}; expected {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be finite")
    return value


def replace_in(config: T, overrides: Mapping[str, Any]) -> T:
    """A copy of `config` with the values at dotted paths replaced, validated as a whole.

    Raises:
        ConfigError: a path that does not exist, or a value its dataclass refuses.
    """
    values = to_dict(config)
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node = values
        for name in parents:
            node = node[name] if isinstance(node.get(name), dict) else {}
        if leaf not in node:
            raise ConfigError(f"{type(config).__name__} has no setting {path!r}")
        node[leaf] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return from_dict(type(config), values)


def parse_setting(text: str) -> tuple[str, Any]:
    """PATH=VALUE of `--set`; the value is JSON, or else plain text."""
    path, separator, value = text.partition("=")
    if not path or not separator:
        raise ConfigError(f"--set {text} is not of the form PATH=VALUE")
    try:
        return path, json.loads(value)
    except ValueError:
        return path, value


def content_hash(value: Any) -> str:
    """SHA-256 (first 16 hex digits) of the canonical JSON of a config or a JSON-ready value."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
