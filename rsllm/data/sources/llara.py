"""LLaRA's processed files, once imported by `rsllm.data.llara`; they bring their own split."""

from __future__ import annotations

from rsllm.config import Domain
from rsllm.data.files import Table
from rsllm.data.sources import movielens
from rsllm.data.sources.base import Source

_COLUMNS = {"user": "user_id", "item": "item_id", "time": "timestamp", "split": "split"}


def _source(name: str, domain: Domain, family: str) -> Source:
    return Source(
        name=f"LLaRA's {name}",
        interactions=Table(files=f"llara-{name}.parquet", columns=_COLUMNS),
        items=Table(
            files=f"llara-{name}-items.parquet", columns={"item": "item_id", "title": "title"}
        ),
        domain=domain,
        family=family,
    )


SOURCES = (
    _source("movielens", "movie", movielens.FAMILY),
    _source("lastfm", "artist", "lastfm"),
    _source("steam", "game", "steam"),
)
