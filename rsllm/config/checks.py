"""Checks of config values; each refusal says the value and the way out."""

from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from rsllm.errors import ConfigError

T = TypeVar("T")
Share = Annotated[float, Field(ge=0, lt=1)]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass whose construction raises ConfigError where a value has not its type."""
    checked: Any = dataclass(cls, config=STRICT, frozen=True, kw_only=True, slots=True)
    unrefused = checked.__init__

    def construct(self: Any, **values: Any) -> None:
        try:
            unrefused(self, **values)
        except ValidationError as error:
            raise refusal(error) from None

    checked.__init__ = construct
    return checked  # type: ignore[no-any-return]


def refusal(error: ValidationError) -> ConfigError:
    """The first thing that is wrong, in words of ours where a check of ours found it."""
    first = error.errors()[0]
    if own := first.get("ctx", {}).get("error"):
        return ConfigError(str(own))
    path, reason = ".".join(map(str, first["loc"])), first["msg"].replace("Input", "it")
    return ConfigError(f"{error.title}: {path} is {first['input']!r}; {reason}")
