"""The text around the items. Data never passes through these strings: titles are joined as ids."""

from __future__ import annotations

from dataclasses import dataclass

SEPARATOR = ","


@dataclass(frozen=True, slots=True)
class Template:
    """Three segments: before the history, between history and candidates, before the answer."""

    opening: str
    choice: str
    question: str


TEMPLATES: dict[str, tuple[Template, ...]] = {
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
}
"""Three templates per domain, as LLaRA has (arXiv 2312.02445); the first is used in evaluation."""
