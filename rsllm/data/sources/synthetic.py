"""The worlds of `rsllm.data.synthetic`."""

from __future__ import annotations

from rsllm.data.files import Table
from rsllm.data.sources.base import Source

SOURCE = Source(
    name="synthetic world",
    interactions=Table(
        files="walks.csv",
        separator=",",
        columns={role: role for role in ("user", "item", "rating", "time")},
    ),
    items=Table(files="titles.csv", separator=",", columns={"item": "item", "title": "title"}),
    domain="movie",
)
