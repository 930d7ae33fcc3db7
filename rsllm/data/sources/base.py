"""What a raw layout says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rsllm.config import Domain
from rsllm.data.files import File, Table, find_files


@dataclass(frozen=True, kw_only=True)
class Source:
    """A raw layout.

    Attributes:
        name: what users call it.
        interactions: user, item, time, and rating if there is one.
        items: item and title; None: the titles stand beside the interactions.
        domain: decides the prompts' wording.
        family: sources of one family hold the same users and must not be mixed.
        marker: a further file that tells this layout from another of the same names.
    """

    name: str
    interactions: Table
    items: Table | None = None
    domain: Domain = "item"
    family: str = ""
    marker: str = ""

    def patterns(self) -> list[str]:
        """The files it needs."""
        return [table.files for table in (self.interactions, self.items) if table]

    def at(self, location: str) -> RawData | None:
        """Its files below `location`, or None if one is missing."""
        interactions = find_files(location, self.interactions.files)
        items = find_files(location, self.items.files) if self.items else []
        if not interactions or (self.items and not items):
            return None
        if self.marker and not find_files(location, self.marker):
            return None
        return RawData(self, interactions, items)


@dataclass(frozen=True)
class RawData:
    """A source and its files."""

    source: Source
    interactions: Sequence[File]
    items: Sequence[File]
