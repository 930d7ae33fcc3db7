"""What a config value must satisfy; each refusal says the value and the way out."""

from __future__ import annotations

import math
from typing import Any

from rsllm.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def at_least(low: float, config: Any, section: str, *names: str) -> None:
    """These settings are finite and not below `low`."""
    for name in names:
        value = getattr(config, name)
        require(low <= value < math.inf, f"{section}.{name} is {value}; it must be at least {low}")


def below_one(config: Any, section: str, *names: str) -> None:
    """These settings lie in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{section}.{name} is {value}; it must be in [0, 1)")


def positive(config: Any, section: str, *names: str) -> None:
    """These settings are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{section}.{name} is {value}; it must be positive")
