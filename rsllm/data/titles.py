"""Titles as prompts show them. Every title of raw data passes `clean_title`, and no other guard."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence

from rsllm.data.files import TableFormat

YEARS, ARTICLES = "years taken off", "articles put first"
ENTITIES, NAMELESS = "titles with HTML entities", "items without a title"
Change = tuple[int, str]
"""The number of values that were changed, or might be, and the first of them by alphabet."""
_YEAR = re.compile(r"( ?\(([0-9]{4}|V|TV)\))+$")
_ARTICLE = re.compile(r"(^|\()([^()]+), (The|An|A)(?= ?(?:[()]|$))")
_ENTITY = re.compile(r"&(#[0-9]+|#x[0-9a-fA-F]+|[a-zA-Z]+[0-9]*);")
_PLACEHOLDERS = {"unknown", "unkonwn", ""}
"""MovieLens-100K's item 267 has no title; GroupLens and RecBole spell that differently."""


def clean_title(
    title: str,
    item: str,
    *,
    strip_years: bool = True,
    move_articles: bool = True,
    unescape: bool = False,
) -> str:
    """Return the title as prompts show it: one line, no year, article in front.

    ``"Matrix, The (1999)"`` becomes ``"The Matrix"``; alternative titles in parentheses stay and
    get the same treatment. A title that is empty or a placeholder becomes ``"item <id>"``.
    """
    title = html.unescape(title) if unescape else title
    visible = (" " if unicodedata.category(c) == "Cc" else c for c in title)
    kept = "".join(c for c in visible if unicodedata.category(c) != "Cf")
    name = " ".join(unicodedata.normalize("NFC", kept).split())
    name = _YEAR.sub("", name) if strip_years else name
    name = (_ARTICLE.sub(r"\1\3 \2", name) if move_articles else name).strip()
    return f"item {item}" if name in _PLACEHOLDERS else name


def item_title(texts: Sequence[str], item: str, table: TableFormat) -> str:
    """Return an item's clean title, with its further texts in parentheses."""
    how = {name: getattr(table, name) for name in ("strip_years", "move_articles", "unescape")}
    first, *more = texts
    words = [clean_title(text, "", **how) for text in more if text.strip()]
    title = clean_title(first, item, **how)
    return f"{title} ({', '.join(words)})" if words else title


def title_changes(titles: Mapping[str, tuple[str, str]], table: TableFormat) -> dict[str, Change]:
    """Return the changes that cleaning makes to titles (clean and raw, by item), or might make."""
    raw = [title for _, title in titles.values()]
    changed = {
        YEARS: [title for title in raw if table.strip_years and _YEAR.search(title.strip())],
        ARTICLES: [title for title in raw if table.move_articles and _ARTICLE.search(title)],
        ENTITIES: [title for title in raw if _ENTITY.search(title)],
        NAMELESS: [clean for item, (clean, _) in titles.items() if clean == f"item {item}"],
    }
    return {what: (len(some), min(some)) for what, some in changed.items() if some}
