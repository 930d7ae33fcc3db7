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


TEMPLATES: dict[Domain, tuple[Template, ...]] = {
    "movie": (
        Template(
            opening="This user has watched",
            choice=". The next movie this user will watch is one of these {num_candidates}:",
            question=".\nThe title of the next movie is",
        ),
        Template(
            opening="Movies a user has watched, oldest first:",
            choice=".\nOut of the following {num_candidates} movies,",
            question=", the user will watch this one next:",
        ),
        Template(
            opening="The watching history of a user is",
            choice=". Please predict the next movie from the candidates",
            question=". Answer with the title only.\nAnswer:",
        ),
    ),
    "game": (
        Template(
            opening="This user has played",
            choice=". The next game this user will play is one of these {num_candidates}:",
            question=".\nThe title of the next game is",
        ),
        Template(
            opening="Games a user has played, oldest first:",
            choice=".\nOut of the following {num_candidates} games,",
            question=", the user will play this one next:",
        ),
        Template(
            opening="The playing history of a user is",
            choice=". Please predict the next game from the candidates",
            question=". Answer with the title only.\nAnswer:",
        ),
    ),
    "artist": (
        Template(
            opening="This user has listened to",
            choice=". The next artist this user will listen to is one of these {num_candidates}:",
            question=".\nThe name of the next artist is",
        ),
        Template(
            opening="Artists a user has listened to, oldest first:",
            choice=".\nOut of the following {num_candidates} artists,",
            question=", the user will listen to this one next:",
        ),
        Template(
            opening="The listening history of a user is",
            choice=". Please predict the next artist from the candidates",
            question=". Answer with the name only.\nAnswer:",
        ),
    ),
    "item": (
        Template(
            opening="This user has chosen",
            choice=". The next item this user will choose is one of these {num_candidates}:",
            question=".\nThe title of the next item is",
        ),
        Template(
            opening="Items a user has chosen, oldest first:",
            choice=".\nOut of the following {num_candidates} items,",
            question=", the user will choose this one next:",
        ),
        Template(
            opening="The history of a user is",
            choice=". Please predict the next item from the candidates",
            question=". Answer with the title only.\nAnswer:",
        ),
    ),
}
"""Three templates per domain, as LLaRA has (arXiv 2312.02445); the first is used in evaluation."""
