"""Prompt -> token ids, item slots and spans; the only place where data text is tokenised.

A prompt is assembled as ids, segment by segment, so no title can become a control token. A title
has the same ids in the history, among the candidates and in the answer. In unified prompts two
positions follow each title: a marker and the item's slot. Both stand on an existing token's id;
the model replaces their vectors, and they are known by position, never by searching ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rsllm.config import Domain, PromptConfig, Representation
from rsllm.errors import ConfigError, DataError
from rsllm.prompts.templates import SEPARATOR, TEMPLATES

NO_ITEM = -1
MARKER = -2


@dataclass(slots=True)
class Tokens:
    """Token ids; `items` holds an item id at slots, MARKER at markers, NO_ITEM elsewhere."""

    ids: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def text(self, ids: Sequence[int]) -> None:
        """Append plain tokens."""
        self.ids.extend(ids)
        self.items.extend([NO_ITEM] * len(ids))

    def extend(self, other: Tokens) -> None:
        """Append another run."""
        self.ids.extend(other.ids)
        self.items.extend(other.items)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt."""

    tokens: Tokens
    history: tuple[int, int]
    """Start and end of the history span (titles, markers and slots, with separators)."""
    choices: list[int]
    """Position of each candidate's last token: its slot, or its last title token."""


class PromptEncoder:
    """Encodes rows of a catalogue for one tokenizer, item representation and domain.

    Attributes:
        terminator: id of the newline that ends an answer.
        num_cut_titles: titles longer than `max_title_tokens`.
        num_dropped_items: history items dropped so far to fit `max_tokens`.
    """

    def __init__(
        self,
        tokenizer: Any,
        titles: Sequence[str],
        config: PromptConfig,
        representation: Representation,
        domain: Domain,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.unified = representation == "unified"
        self.templates = TEMPLATES[domain]
        self.prefix = _prefix_ids(tokenizer)
        self.terminator = _terminator_id(tokenizer)
        self.title_ids, self.num_cut_titles = self._tokenize_titles(titles)
        self.num_dropped_items = 0
        self._segments: dict[str, list[int]] = {}

    def of(self, titles: Sequence[str], domain: Domain) -> PromptEncoder:
        """The same for another catalogue."""
        representation: Representation = "unified" if self.unified else "text"
        return PromptEncoder(self.tokenizer, titles, self.config, representation, domain)

    def _tokenize_titles(self, titles: Sequence[str]) -> tuple[list[list[int]], int]:
        lead = _title_lead(self.tokenizer)
        encoded = self.tokenizer(
            [lead + title for title in titles], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        control = set(self.tokenizer.added_tokens_decoder) | {self.terminator}
        for title, ids in zip(titles, encoded, strict=True):
            if not (ids and title.strip()) or control & set(ids):
                raise DataError(f"title {title!r} is empty or reads as a control token; rename it")
        limit = self.config.max_title_tokens
        return [ids[:limit] for ids in encoded], sum(len(ids) > limit for ids in encoded)

    def _segment(self, text: str) -> list[int]:
        if text not in self._segments:
            self._segments[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._segments[text]

    def item(self, item: int, slot: int | None = None) -> Tokens:
        """One item alone, in this representation: title, then marker and slot if unified.

        The slot's item is `item` itself, unless another row of the item tables is named.
        """
        tokens = Tokens()
        tokens.text(self.title_ids[item])
        if self.unified:
            tokens.ids.extend([self.terminator] * 2)
            tokens.items.extend([MARKER, item if slot is None else slot])
        return tokens

    def prompt(self, history: Sequence[int], candidates: Sequence[int], template: int) -> Prompt:
        """Encode one row; the oldest history items are dropped whole until it fits.

        Raises:
            DataError: the candidates alone do not fit.
        """
        text = self.templates[template % len(self.templates)]
        choice = text.choice.replace("{num_candidates}", str(len(candidates)))
        tail, ends = self._list(candidates)
        fixed = len(self.prefix) + sum(
            len(self._segment(s)) for s in (text.opening, choice, text.question)
        )
        past = self._fitting_history(history, self.config.max_tokens - fixed - len(tail))
        tokens = Tokens()
        tokens.text(self.prefix + self._segment(text.opening))
        start = len(tokens)
        tokens.extend(past)
        span = (start, len(tokens))
        tokens.text(self._segment(choice))
        ends = [len(tokens) + end for end in ends]
        tokens.extend(tail)
        tokens.text(self._segment(text.question))
        return Prompt(tokens, span, ends)

    def _list(self, items: Sequence[int]) -> tuple[Tokens, list[int]]:
        """Items joined by separators, and the position of each one's last token."""
        tokens, ends = Tokens(), []
        for index, item in enumerate(items):
            if index:
                tokens.text(self._segment(SEPARATOR))
            tokens.extend(self.item(item))
            ends.append(len(tokens) - 1)
        return tokens, ends

    def _fitting_history(self, history: Sequence[int], room: int) -> Tokens:
        for first in range(len(history)):
            tokens, _ = self._list(history[first:])
            if len(tokens) <= room:
                self.num_dropped_items += first
                return tokens
        raise DataError(
            f"a prompt needs {self.config.max_tokens - room} tokens beside its history, and no"
            f" history item fits into prompt.max_tokens = {self.config.max_tokens}; raise it or"
            " lower data.num_candidates"
        )


def _prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (a BOS token, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(plain) + 1)
    at = next(i for i in starts if full[i : i + len(plain)] == plain)
    return list(full[:at])


def _terminator_id(tokenizer: Any) -> int:
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.decode(ids[-1:]) != "\n":
        raise ConfigError("the backbone's tokenizer has no token for a newline, which ends answers")
    return int(ids[-1])


def _title_lead(tokenizer: Any) -> str:
    """The space before a title, unless the tokenizer adds one by itself."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    return "" if first[0].startswith("\u2581") else " "
