"""Last.fm: HetRec 2011 and LFM-1K, as artists a user turned to.

Layouts: https://grouplens.org/datasets/hetrec-2011/ and
http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html. HetRec's plays carry no time, so its
tag assignments are taken, which do; LFM-1K's artists often lack an id, so their names are it.
"""

from __future__ import annotations

from rsllm.data.files import Table
from rsllm.data.sources.base import Source

_FAMILY = "lastfm"

SOURCES = (
    Source(
        name="HetRec 2011 Last.fm",
        interactions=Table(
            files="user_taggedartists-timestamps.dat",
            separator="\t",
            columns={"user": "userID", "item": "artistID", "time": "timestamp"},
            time_unit="milliseconds",
        ),
        items=Table(files="artists.dat", separator="\t", columns={"item": "id", "title": "name"}),
        domain="artist",
        family=_FAMILY,
    ),
    Source(
        name="LFM-1K",
        interactions=Table(
            files="userid-timestamp-artid-artname-traid-traname.tsv",
            separator="\t",
            header=("user", "time", "artist id", "artist", "track id", "track"),
            columns={"user": "user", "item": "artist", "time": "time", "title": "artist"},
            time_unit="iso8601",
        ),
        domain="artist",
        family=_FAMILY,
    ),
)
