"""The text around the items. Data never passes through these strings: titles are joined as ids."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsllm.config import Domain

SEPARATOR = ","
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
Answer = Literal["title", "number", "letter"]


@dataclass(frozen=True, slots=True)
class Template:
    """Three segments: before the history, between history and candidates, before the answer."""

    opening: str
    choice: str
    question: str


def templates(domain: Domain, answer: Answer) -> tuple[Template, ...]:
    """Those of `templates.toml` in a domain's words; `{num_candidates}` stays to be filled in."""
    words: dict[str, str] = TEXTS["words"][domain]
    words = words | {"Noun": words["noun"].capitalize(), "num_candidates": "{num_candidates}"}
    words["asked"] = words["title"] if answer == "title" else answer
    filled = ({part: text.format(**words) for part, text in t.items()} for t in TEXTS["template"])
    return tuple(Template(**segments) for segments in filled)
