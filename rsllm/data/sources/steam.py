"""Steam reviews as UCSD ships them: one Python literal (or JSON object) per line, gzip or plain.

Layout: https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data (version 2: reviews and games).
"""

from __future__ import annotations

from rsllm.data.files import Table
from rsllm.data.sources.base import Source

SOURCE = Source(
    name="Steam",
    interactions=Table(
        files="steam_reviews.json*",
        columns={"user": "username", "item": "product_id", "time": "date"},
        time_unit="iso8601",
    ),
    items=Table(files="steam_games.json*", columns={"item": "id", "title": "app_name"}),
    domain="game",
    family="steam",
)
