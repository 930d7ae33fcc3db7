"""Config dataclasses as plain data: JSON round trip, dotted paths, `--set`, content hash."""

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from rsllm.config.checks import refusal
from rsllm.errors import ConfigError, did_you_mean

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON-ready form of a config dataclass."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a config dataclass from `to_dict`'s form.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        raise refusal(error) from None


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
            hint = did_you_mean(path, (known for known, _ in flat(to_dict(config))))
            raise ConfigError(
                f"{type(config).__name__} has no setting {path!r}{hint or '; see rsllm settings'}"
            )
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


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a TOML file by dotted paths; tables in it are sections.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return dict(flat(tomllib.loads(path.read_text("utf-8"))))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read as TOML: {error}") from None


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted paths."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def content_hash(value: Any) -> str:
    """SHA-256 (first 16 hex digits) of the canonical JSON of a config or a JSON-ready value."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
