"""The errors a user can meet. Each message names the value at fault and the way out."""

import difflib
from collections.abc import Iterable


class RsllmError(Exception):
    """Base of every error rsllm raises on purpose; users see it without a traceback."""

    exit_code = 1


class ConfigError(RsllmError, ValueError):
    """A setting that cannot work; the user's mistake."""

    exit_code = 2


class DataError(RsllmError):
    """Raw or prepared data that is missing, damaged or inconsistent."""


class CheckpointError(RsllmError):
    """A run folder or checkpoint that is missing, incomplete or altered."""


class TrainingError(RsllmError):
    """Training cannot start or cannot go on."""


class Interrupted(TrainingError):
    """A run that was told to stop, and has saved what it has."""


class EvaluationError(RsllmError):
    """Scores or rankings that cannot be evaluated."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error's sentence that proposes the nearest of what is known, if one is near."""
    near = difflib.get_close_matches(word, [*known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
