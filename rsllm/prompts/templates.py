"""The text around the items. Data never passes through these strings: titles are joined as ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rsllm.config import Domain

SEPARATOR = ","
Answer = Literal["title", "number", "letter"]


@dataclass(frozen=True, slots=True)
class Template:
    """Three segments: before the history, between history and candidates, before the answer."""

    opening: str
    choice: str
    question: str


_WORDS: dict[Domain, tuple[str, str, str, str, str]] = {
    "movie": ("movie", "watch", "watched", "watching", "title"),
    "game": ("game", "play", "played", "playing", "title"),
    "artist": ("artist", "listen to", "listened to", "listening", "name"),
    "item": ("item", "choose", "chosen", "choice", "title"),
}


def templates(domain: Domain, answer: Answer) -> tuple[Template, ...]:
    """Three per domain, as LLaRA has (arXiv 2312.02445); the first is used in evaluation."""
    noun, act, done, doing, name = _WORDS[domain]
    asked = name if answer == "title" else answer
    return (
        Template(
            opening=f"This user has {done}",
            choice=f". The next {noun} this user will {act} is one of these {{num_candidates}}:",
            question=f".\nThe {asked} of the next {noun} is",
        ),
        Template(
            opening=f"{noun.capitalize()}s a user has {done}, oldest first:",
            choice=f".\nOut of the following {{num_candidates}} {noun}s,",
            question=f", the user will {act} the one with this {asked} next:",
        ),
        Template(
            opening=f"The {doing} history of a user is",
            choice=f". Please predict the next {noun} from the candidates",
            question=f". Answer with the {asked} only.\nAnswer:",
        ),
    )
