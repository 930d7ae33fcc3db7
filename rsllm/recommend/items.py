"""Which item a user of rsllm means by a title or an id."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Ints
from rsllm.data.titles import clean_title
from rsllm.errors import ConfigError, require

NEAREST = 3
"""Titles that an error proposes."""


class UnknownItem(ConfigError):
    """A title or an id that the data do not have."""


def as_names(names: Iterable[str | int]) -> list[str | int]:
    """Several names as a list; one name is refused, which Python would read letter by letter."""
    several = isinstance(names, Iterable) and not isinstance(names, str | bytes)
    require(several, f"{names!r} is one name; give a list, even of one")
    return [*names]


@dataclass(frozen=True)
class Items:
    """The items of prepared data, by title and by id."""

    data: PreparedData

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {name: item for item, name in enumerate(self.data.source_ids)}

    @cached_property
    def _by_title(self) -> dict[str, int]:
        """The first item of each title, in any letter case."""
        first: dict[str, int] = {}
        for item, title in enumerate(self.data.titles):
            first.setdefault(title.casefold(), item)
        return first

    def find(self, text: str | int) -> int:
        """The item that a title (exact, then in any case or as raw data write it) or an id means.

        Raises:
            UnknownItem: none, with the nearest titles; or a title and an id that are not one item.
        """
        found = self.known(text)
        if found is None:
            nearest = [repr(self.data.titles[item]) for item in self.nearest(str(text))]
            hint = f"; the nearest titles are {', '.join(nearest)}" if nearest else ""
            raise UnknownItem(f"no item is called {str(text)!r}{hint}")
        return found

    def known(self, text: str | int) -> int | None:
        """The same, or None if there is none; nothing like it is looked for, which takes long.

        Raises:
            UnknownItem: a title and an id that are not one item.
        """
        text = str(text)
        written = [text.casefold(), clean_title(text, "").casefold()]
        titled = next((self._by_title[t] for t in written if t in self._by_title), None)
        known = self._by_id.get(text)
        if titled is None or known is None:
            return known if titled is None else titled
        if titled != known:
            raise UnknownItem(
                f"{text!r} is a title and also the id of {self.data.titles[known]!r}; say the id"
                f" {self.data.source_ids[titled]!r} or the other's title"
            )
        return titled

    def nearest(self, text: str, count: int = NEAREST) -> list[int]:
        """The items whose titles are written most alike, best first."""
        close = difflib.get_close_matches(text.casefold(), self._by_title, count, cutoff=0.4)
        return [self._by_title[title] for title in close]

    def search(self, text: str, count: int) -> list[int]:
        """The items whose titles contain a text, the shortest first; else those `nearest` to it."""
        text = text.casefold()
        held = sorted((title for title in self._by_title if text in title), key=len)
        return [self._by_title[title] for title in held[:count]] or self.nearest(text, count)

    def find_all(self, texts: Iterable[str | int]) -> Ints:
        """The items of several titles or ids, in their order."""
        return np.array([self.find(text) for text in as_names(texts)], np.int32)
