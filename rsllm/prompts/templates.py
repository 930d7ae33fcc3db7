"""The text around the items. Data never passes through these strings: titles are joined as ids."""

import tomllib
from pathlib import Path
from typing import Literal

from rsllm.config import Domain
from rsllm.config.plain import content_hash

SEPARATOR = ","
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
Answer = Literal["title", "number", "letter"]


def templates(domain: Domain, answer: Answer) -> list[dict[str, str]]:
    """Those of `templates.toml` in a domain's words; `{num_candidates}` stays to be filled in.

    Each has three segments: `opening` before the history, `choice` between history and candidates,
    `question` before the answer.
    """
    words = {**TEXTS["words"][domain], "num_candidates": "{num_candidates}"}
    asked = words["title"] if answer == "title" else answer
    words |= {"Noun": words["noun"].capitalize(), "asked": asked}
    return [{part: text.format(**words) for part, text in t.items()} for t in TEXTS["template"]]


def wording() -> str:
    """Hash of all of `templates.toml`, which decides what is learned and scored with it."""
    return content_hash(TEXTS)
