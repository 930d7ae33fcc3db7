"""RecBole's atomic files: tab-separated, one header line of `name:type`.

Layout: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from __future__ import annotations

from rsllm.data.files import Table, find_files
from rsllm.data.sources import movielens
from rsllm.data.sources.base import RawData, Source
from rsllm.data.tables import columns_of
from rsllm.errors import DataError

_RATING = "rating:float"
_TITLES = ("movie_title:token_seq", "title:token_seq", "name:token_seq")


def at(location: str) -> RawData | None:
    """The atomic files in a folder; MovieLens' are known by their name.

    Raises:
        DataError: no column of titles.
    """
    interactions, items = find_files(location, "*.inter"), find_files(location, "*.item")
    if not interactions or not items:
        return None
    columns = {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
    tab = Table(files="*.inter", separator="\t", columns=columns)
    if _RATING in columns_of(interactions[0], tab):
        columns["rating"] = _RATING
    found = columns_of(items[0], tab)
    title = next((name for name in _TITLES if name in found), None)
    if title is None:
        raise DataError(f"{items[0].name} has none of the title columns {', '.join(_TITLES)}")
    film = interactions[0].name.startswith("ml-")
    source = Source(
        name="RecBole",
        interactions=Table(
            files="*.inter",
            separator="\t",
            columns=columns,
            max_rating=movielens.MAX_RATING if film else float("inf"),
        ),
        items=Table(
            files="*.item", separator="\t", columns={"item": "item_id:token", "title": title}
        ),
        domain="movie" if film else "item",
        family=movielens.FAMILY if film else "",
    )
    return RawData(source, interactions, items)
