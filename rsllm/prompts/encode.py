"""Prompt -> token ids, item slots and spans; the only place where data text is tokenised.

A prompt is assembled as ids, segment by segment, so no title can become a control token. A title
has the same ids in the history, among the candidates and in the answer. An item is written in the
parts that `REPRESENTATIONS` lists.

Markers and slots stand on an existing token's id; the model replaces their vectors, and they are
known by position, never by searching ids. To be answered by letter, candidates read "(A) title".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from string import ascii_uppercase
from typing import Any

from rsllm.config import REPRESENTATIONS, Domain, Form, PromptConfig, Representation
from rsllm.errors import ConfigError, DataError
from rsllm.prompts.templates import SEPARATOR, Answer, templates

NO_ITEM = -1
MARKER = -2
FEWEST, UNLIMITED = 16, 1 << 30
"""Tokens that a prompt is allowed at least, and positions of a model that has no limit."""


@dataclass(slots=True)
class Tokens:
    """Token ids; `items` holds an item id at slots, MARKER at markers, NO_ITEM elsewhere."""

    ids: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, ids: Sequence[int]) -> Tokens:
        """Plain tokens."""
        return cls([*ids], [NO_ITEM] * len(ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.ids + other.ids, self.items + other.items)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt."""

    tokens: Tokens
    history: tuple[int, int]
    """Start and end of the history span (items with separators)."""
    choices: list[int]
    """Position of each candidate's last token: its slot, or the last of its name."""


@dataclass(frozen=True, slots=True)
class History:
    """A history prompt: items alone, oldest first."""

    tokens: Tokens
    starts: list[int]
    """Position of each item's first token."""
    ends: list[int]
    """Position of each item's last token: its slot, or the last of its name."""


class PromptEncoder:
    """Encodes rows of a catalogue for one tokenizer, item representation and domain.

    Attributes:
        representation: how items are written.
        slotted: whether that has slots.
        named: whether it has titles or numbers.
        form: of its prompts: a choice among candidates, or a history that the next title follows.
        title_ids: ids of each item's name: its title, or under `index` its number.
        terminator: id of the newline that ends a title.
        ending: what ends an answer: the terminator, or nothing after a letter.
        max_tokens: of a prompt: `prompt.max_tokens`, or what the positions leave beside an answer.
        num_cut_titles: titles longer than `max_title_tokens`.
        num_dropped_items: history items dropped so far to fit `max_tokens`.

    Raises:
        ConfigError: the tokenizer has no token for the newline, or none for a letter to answer, or
            there are too few positions for any prompt.
        DataError: a title that is empty, or reads as a control token.
    """

    def __init__(
        self,
        tokenizer: Any,
        titles: Sequence[str],
        config: PromptConfig,
        representation: Representation,
        domain: Domain,
        *,
        form: Form = "choice",
        positions: int = UNLIMITED,
    ) -> None:
        self.tokenizer, self.config, self.form = tokenizer, config, form
        self.positions = positions
        self._room = positions - config.max_title_tokens - 1
        if self._room < FEWEST:
            raise ConfigError(
                f"the backbone has a context of {positions} tokens only, and an answer may take"
                f" prompt.max_title_tokens + 1 = {config.max_title_tokens + 1} of them; lower that,"
                " or choose a backbone with more positions"
            )
        self.max_tokens = min(config.max_tokens, self._room)
        self.representation: Representation = representation
        parts = REPRESENTATIONS[representation]
        self.slotted, numbers = "slot" in parts, "number" in parts
        self.named = numbers or "title" in parts
        self.prefix = _prefix_ids(tokenizer)
        self.terminator = _terminator_id(tokenizer)
        letters = config.answer == "letter"
        names = [str(item + 1) for item in range(len(titles))] if numbers else titles
        self.title_ids, self.num_cut_titles = self._tokenize(names)
        answer: Answer = "letter" if letters else "number" if numbers else "title"
        self.templates = templates(domain, answer)
        self.ending = [] if letters else [self.terminator]
        self._letters = _letters(tokenizer) if letters else None
        self.num_dropped_items = 0
        self._segments: dict[str, list[int]] = {}
        self._separator = self._segment(SEPARATOR)
        gap = Tokens.of(self._separator)  # behind each item
        self._past = self._choices = [self.item(item) + gap for item in range(len(titles))]
        if self.slotted and not config.candidate_slots:
            self._choices = [Tokens.of(ids) + gap for ids in self.title_ids]

    def of(
        self, titles: Sequence[str], domain: Domain, written: Representation | None = None
    ) -> PromptEncoder:
        """The same for another catalogue, or with its items written in another way."""
        written = written or self.representation
        kept: Any = {"form": self.form, "positions": self.positions}
        return PromptEncoder(self.tokenizer, titles, self.config, written, domain, **kept)

    def _tokenize(self, names: Sequence[str]) -> tuple[list[list[int]], int]:
        lead = _title_lead(self.tokenizer)
        encoded = self.tokenizer(
            [lead + name for name in names], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        control = control_ids(self.tokenizer) | {self.terminator}
        for name, ids in zip(names, encoded, strict=True):
            if not (ids and name.strip()) or control & set(ids):
                raise DataError(f"title {name!r} is empty or reads as a control token; rename it")
        limit = self.config.max_title_tokens
        return [ids[:limit] for ids in encoded], sum(len(ids) > limit for ids in encoded)

    def _segment(self, text: str) -> list[int]:
        if text not in self._segments:
            self._segments[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._segments[text]

    def item(self, item: int, slot: int | None = None) -> Tokens:
        """One item alone, in this representation.

        The slot's item is `item` itself, unless another row of the item tables is named.
        """
        values = {"marker": MARKER, "slot": item if slot is None else slot}
        slots = [values[part] for part in REPRESENTATIONS[self.representation] if part in values]
        name = Tokens.of(self.title_ids[item] if self.named else [])
        return name + Tokens([self.terminator] * len(slots), slots)

    def answers(self, candidates: Sequence[int]) -> list[list[int]]:
        """Ids of each candidate's answer, without `ending`: its name, or its letter here."""
        if self._letters is None:
            return [self.title_ids[item] for item in candidates]
        return self._letters.answers[: len(candidates)]

    def answer_length(self, target: int) -> int:
        """Number of tokens of an answer, `ending` included."""
        return (len(self.title_ids[target]) if self._letters is None else 1) + len(self.ending)

    def prompt(self, history: Sequence[int], candidates: Sequence[int], template: int) -> Prompt:
        """Encode one row; the oldest history items are dropped whole until it fits.

        Raises:
            ConfigError: more candidates than letters, or the candidates alone do not fit.
        """
        opening, choice, question = self._text(template, len(candidates))
        runs = [self._choices[item] for item in self._listed(candidates)]
        if self._letters is not None:
            runs = self._letters.before(runs)
        fixed = len(opening) + len(choice) + len(question)
        fixed += max(0, sum([len(run.ids) for run in runs]) - len(self._separator))
        tokens = Tokens.of(opening)
        self._join(self._newest(history, fixed), tokens)
        span = (len(opening), len(tokens))
        tokens += Tokens.of(choice)
        ends = self._join(runs, tokens)
        tokens += Tokens.of(question)
        return Prompt(tokens, span, ends)

    def history(self, items: Sequence[int], template: int) -> History:
        """Encode a history alone; the oldest items are dropped whole until it fits.

        The tokens up to an item's last one are those of the prompt that ends there.

        Raises:
            ConfigError: not even the last item fits.
        """
        opening, _, _ = self._text(template, 0)
        tokens = Tokens.of(opening)
        ends = self._join(self._newest(items, len(opening)), tokens)
        starts = [len(opening), *(end + 1 + len(self._separator) for end in ends[:-1])]
        return History(tokens, starts, ends)

    def fitting(self, items: Sequence[int], template: int) -> Sequence[int]:
        """The newest items of a history, as many as a prompt of them alone has room for."""
        opening, _, _ = self._text(template, 0)
        return items[-self._num_fitting(items, len(opening)) :]

    def length(self, history: Sequence[int], candidates: Sequence[int], template: int) -> int:
        """Tokens of a prompt, but for the letters that all have alike."""
        text = sum(map(len, self._text(template, len(candidates))))
        past = sum(len(self._past[item].ids) for item in history)
        listed = sum(len(self._choices[item].ids) for item in self._listed(candidates))
        return min(text + past + listed - 2 * len(self._separator), self.max_tokens)

    def _listed(self, candidates: Sequence[int]) -> Sequence[int]:
        """Of the candidates, those that stand in the prompt: all, or none in a history prompt."""
        return candidates if self.form == "choice" else ()

    def _text(self, template: int, num_candidates: int) -> tuple[list[int], list[int], list[int]]:
        """What stands before the history, before the candidates and before the answer."""
        text = self.templates[template % len(self.templates)]
        if self.form == "history":
            return self.prefix + self._segment(text["opening"]), [], self._separator
        choice = text["choice"].replace("{num_candidates}", str(num_candidates))
        question = self._segment(text["question"])
        if self._letters is not None:
            question = question + self._letters.opening
        return self.prefix + self._segment(text["opening"]), self._segment(choice), question

    def _join(self, runs: Sequence[Tokens], tokens: Tokens) -> list[int]:
        """Append items, separators between; returns the position of each one's last token."""
        ids, items, ends = tokens.ids, tokens.items, []
        gap = len(self._separator) if runs else 0
        for run in runs:
            ids += run.ids
            items += run.items
            ends.append(len(ids) - gap - 1)
        del ids[len(ids) - gap :], items[len(items) - gap :]
        return ends

    def _newest(self, history: Sequence[int], fixed: int) -> list[Tokens]:
        """As many of the last items as fit beside `fixed` tokens."""
        kept = self._num_fitting(history, fixed)
        self.num_dropped_items += len(history) - kept
        return [self._past[item] for item in history[-kept:]]

    def _num_fitting(self, history: Sequence[int], fixed: int) -> int:
        ends = list(accumulate([len(self._past[item].ids) for item in reversed(history)]))
        gap = len(self._separator)
        if kept := bisect_right(ends, self.max_tokens - fixed + gap):
            return kept
        listed, titles = "data.num_candidates", "prompt.max_title_tokens"
        shorter = f"lower {listed if self.form == 'choice' else titles}"
        both = f"{shorter} or {titles}" if self.form == "choice" else shorter
        if fixed + ends[0] - gap <= self._room:
            limit = f"prompt.max_tokens = {self.max_tokens}; raise it or {shorter}"
        else:
            limit = (
                f"the {self._room} that an answer leaves of the backbone's {self.positions}"
                f" positions; {both}, or choose a backbone with more positions"
            )
        raise ConfigError(
            f"a prompt needs {fixed} tokens beside its history, and no history item fits into"
            f" {limit}"
        )


@dataclass(frozen=True, slots=True)
class _Letters:
    """Candidates' letters: an answer is the one token between the brackets of its label."""

    opening: list[int]
    labels: list[list[int]]
    answers: list[list[int]]

    def before(self, runs: Sequence[Tokens]) -> list[Tokens]:
        labels = self.labels[: len(runs)]
        if len(runs) > len(labels):
            raise ConfigError(
                f"{len(runs)} candidates, but prompt.answer = letter has {len(labels)} letters;"
                " lower num_candidates, or choose prompt.answer = title"
            )
        return [Tokens.of(ids) + run for ids, run in zip(labels, runs, strict=True)]


def _letters(tokenizer: Any) -> _Letters:
    lead = _title_lead(tokenizer)
    opening, *labels = tokenizer(
        [lead + "(", *(f"{lead}({letter})" for letter in ascii_uppercase)], add_special_tokens=False
    )["input_ids"]
    answers = [ids[len(opening) : len(opening) + 1] for ids in labels]
    for letter, ids, answer in zip(ascii_uppercase, labels, answers, strict=True):
        if ids[: len(opening)] != opening or tokenizer.decode(answer) != letter:
            raise ConfigError(
                f"the backbone's tokenizer splits '({letter})' into"
                f" {tokenizer.convert_ids_to_tokens(ids)}, where the letter is no token of its own;"
                " choose prompt.answer = title"
            )
    return _Letters(opening, labels, answers)


def control_ids(tokenizer: Any) -> set[int]:
    """Of the tokens that text must not become; other added tokens are words like any."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}


def _prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (a BOS token, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return list(full[:at])
    raise ConfigError(
        "the backbone's tokenizer writes a text otherwise where it adds its control tokens;"
        " choose another backbone"
    )


def _terminator_id(tokenizer: Any) -> int:
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.decode(ids[-1:]) != "\n":
        raise ConfigError(
            "the backbone's tokenizer has no token for a newline, which ends answers; choose"
            " another backbone"
        )
    return int(ids[-1])


def _title_lead(tokenizer: Any) -> str:
    """The space before a title, unless the tokenizer adds one by itself."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    return "" if first[0].startswith("\u2581") else " "
