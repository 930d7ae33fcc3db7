"""Titles as prompts show them: one clean line each."""

from __future__ import annotations

import re
import unicodedata

_YEAR = re.compile(r"( ?\(([0-9]{4}|V|TV)\))+$")
_ARTICLE = re.compile(r"(^|\()([^()]+), (The|An|A)(?= ?(?:[()]|$))")
_PLACEHOLDERS = {"unknown", "unkonwn"}
"""MovieLens-100K's item 267 has no title; GroupLens and RecBole spell that differently."""


def clean_title(title: str, item: str) -> str:
    """The title as prompts show it: one line, no year, article in front.

    ``"Matrix, The (1999)"`` becomes ``"The Matrix"``; alternative titles in parentheses stay and
    get the same treatment. A title that is empty or a placeholder becomes ``"item <id>"``.
    """
    visible = (" " if unicodedata.category(c) == "Cc" else c for c in title)
    kept = "".join(c for c in visible if unicodedata.category(c) != "Cf")
    line = " ".join(unicodedata.normalize("NFC", kept).split())
    name = _ARTICLE.sub(r"\1\3 \2", _YEAR.sub("", line)).strip()
    return f"item {item}" if name in _PLACEHOLDERS or not name else name
