"""MovieLens as GroupLens ships it: 100K; 1M and 10M; 20M, 25M, 32M and latest.

Layouts: https://files.grouplens.org/datasets/movielens/ (README of each edition).
"""

from __future__ import annotations

from rsllm.data.files import Table
from rsllm.data.sources.base import Source

FAMILY = "movielens"
MAX_RATING = 5.0
_ROLES = ("user", "item", "rating", "time")
_SAME = {role: role for role in _ROLES}
_TITLES = {"item": "item", "title": "title"}


def _source(name: str, interactions: Table, items: Table, marker: str = "") -> Source:
    return Source(
        name=name,
        interactions=interactions,
        items=items,
        domain="movie",
        family=FAMILY,
        marker=marker,
    )


def _dat(name: str, encoding: str, marker: str) -> Source:
    return _source(
        name,
        Table(
            files="ratings.dat",
            separator="::",
            header=_ROLES,
            columns=_SAME,
            max_rating=MAX_RATING,
        ),
        Table(
            files="movies.dat",
            separator="::",
            header=("item", "title", "genres"),
            columns=_TITLES,
            encoding=encoding,
        ),
        marker,
    )


SOURCES = (
    _source(
        "MovieLens-100K",
        Table(files="u.data", separator="\t", header=_ROLES, columns=_SAME, max_rating=MAX_RATING),
        Table(
            files="u.item",
            separator="|",
            header=("item", "title", *(f"field {n}" for n in range(22))),
            columns=_TITLES,
            encoding="latin-1",
        ),
    ),
    _dat("MovieLens-1M", "latin-1", marker="users.dat"),
    _dat("MovieLens-10M", "utf-8", marker=""),
    _source(
        "MovieLens-20M, 25M, 32M, latest",
        Table(
            files="ratings.csv",
            separator=",",
            columns={"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"},
            max_rating=MAX_RATING,
        ),
        Table(
            files="movies.csv",
            separator=",",
            columns={"item": "movieId", "title": "title"},
            quoting=True,
        ),
    ),
)
