"""The text around the items. Data never passes through these strings: titles are joined as ids."""

from __future__ import annotations

from dataclasses import dataclass

from rsllm.config import Domain

SEPARATOR = ","


@dataclass(frozen=True, slots=True)
class Template:
    """Three segments: before the history, between history and candidates, before the answer."""

    opening: str
    choice: str
    question: str


def _templates(noun: str, act: str, done: str, doing: str, name: str) -> tuple[Template, ...]:
    return (
        Template(
            opening=f"This user has {done}",
            choice=f". The next {noun} this user will {act} is one of these {{num_candidates}}:",
            question=f".\nThe {name} of the next {noun} is",
        ),
        Template(
            opening=f"{noun.capitalize()}s a user has {done}, oldest first:",
            choice=f".\nOut of the following {{num_candidates}} {noun}s,",
            question=f", the user will {act} this one next:",
        ),
        Template(
            opening=f"The {doing} history of a user is",
            choice=f". Please predict the next {noun} from the candidates",
            question=f". Answer with the {name} only.\nAnswer:",
        ),
    )


TEMPLATES: dict[Domain, tuple[Template, ...]] = {
    "movie": _templates("movie", "watch", "watched", "watching", "title"),
    "game": _templates("game", "play", "played", "playing", "title"),
    "artist": _templates("artist", "listen to", "listened to", "listening", "name"),
    "item": _templates("item", "choose", "chosen", "choosing", "title"),
}
"""Three templates per domain, as LLaRA has (arXiv 2312.02445); the first is used in evaluation."""
