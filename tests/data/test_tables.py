"""What real files look like: every kind of table is read as its owner means it, or says why not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_folders import read

from rsllm.config import Experiment, TableConfig
from rsllm.config.plain import replace_in
from rsllm.data import delimited, files, raw, sources, tables
from rsllm.data.account import hint_of
from rsllm.data.files import Reject, TableFormat
from rsllm.data.raw import FOLDED
from rsllm.data.titles import ARTICLES, ENTITIES, NAMELESS, YEARS
from rsllm.errors import ConfigError, DataError

NAMES = ("Amber Lantern", "Brisk Harbour", "Calm Meadow", "Dusty Compass", "Eager Violin")
NAMES += ("Fuzzy Orchard", "Golden Glacier", "Hollow Saddle")
TITLES = {str(item): title for item, title in enumerate(NAMES, start=1)}
EVENTS = [
    (str(user), str(1 + (3 * user + 5 * step) % 8), 1_500_000_000 + 100_000 * user + 3_600 * step)
    for user in range(1, 11)
    for step in range(7)
]
HEADER = ("user_id", "item_id", "timestamp", "title")
ROWS = [(user, item, str(time), TITLES[item]) for user, item, time in EVENTS]
Files = dict[str, bytes]


def text(rows: Any = ROWS, separator: str = ",", header: Any = HEADER, end: str = "\n") -> str:
    """Plain lines; nothing is quoted."""
    return "".join(separator.join(row) + end for row in [*([header] if header else []), *rows])


def titled(**titles: str) -> list[tuple[str, ...]]:
    """The rows with other titles of some items."""
    return [(*row[:3], titles.get(f"i{row[1]}", row[3])) for row in ROWS]


def dated(form: Any) -> list[tuple[str, ...]]:
    """The rows with their times written by `form`."""
    return [(user, item, form(int(time)), title) for user, item, time, title in ROWS]


def quoted(rows: Any = ROWS, end: str = "\r\n", header: Any = HEADER, **how: Any) -> str:
    """As a spreadsheet writes it."""
    held = io.StringIO(newline="")
    writer = csv.writer(held, lineterminator=end, **how)
    writer.writerows([header, *rows])
    return held.getvalue()


def objects(rows: Any = ROWS) -> list[dict[str, Any]]:
    numbered = ([int(u), int(i), int(t), title] for u, i, t, title in rows)
    return [dict(zip(HEADER, row, strict=True)) for row in numbered]


def utc(pattern: str) -> Any:
    return lambda time: datetime.fromtimestamp(time, UTC).strftime(pattern)


def two_hours_on(time: int) -> str:
    return f"{utc('%Y-%m-%d %H:%M:%S')(time + 7200)}+02:00"


AMELIE = "Am\u00e9lie"
PAIRS = [(user, item, str(time)) for user, item, time in EVENTS]
ITEMS = list(TITLES.items())


def case(files: Files, config: Any = (), titles: Any = ()) -> tuple[Files, Any, Any]:
    """Files that hold the log, the settings to read them by, and titles that differ in them."""
    return files, dict(config), dict(titles)


SAME = {
    "RecBole with title:token": case(
        {
            "Toys.inter": text(
                [(u, i, "4.0", t) for u, i, t in PAIRS],
                "\t",
                ("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
            ).encode(),
            "Toys.item": text(ITEMS, "\t", ("item_id:token", "title:token")).encode(),
        }
    ),
    "RecBole with names of its own": case(
        {
            "s.inter": text(
                PAIRS, "\t", ("user_id:token", "product_id:token", "timestamp:float")
            ).encode(),
            "s.item": text(
                [(title, item) for item, title in ITEMS], "\t", ("app_name:token_seq", "id:token")
            ).encode(),
        }
    ),
    "items in a folder with an id of their own": case(
        {
            "ratings.csv": text(PAIRS, header=("userId", "movieId", "timestamp")).encode(),
            "films.csv": text(ITEMS, header=("id", "title")).encode(),
        }
    ),
    "items by settings": case(
        {
            "a.csv": text(PAIRS, header=("x", "y", "z")).encode(),
            "b/films.csv": text(ITEMS, header=("key", "said")).encode(),
        },
        {"user": "x", "item": "y", "time": "z", "items": "b", "item_id": "key", "title": "said"},
    ),
    "quoted line breaks": case(
        {
            "r.csv": quoted(
                [(*row, 'Good.\r\nWould buy again, ""maybe"".') for row in ROWS],
                header=(*HEADER, "review"),
            ).encode()
        }
    ),
    "quoted line breaks in titles": case({"r.csv": quoted(titled(i3="Calm\nMeadow")).encode()}),
    "titles that begin with a quote in a TSV": case(
        {"p.tsv": text(titled(i2='"Brisk" Harbour', i5='"Eager Violin'), "\t").encode()},
        {},
        {"2": '"Brisk" Harbour', "5": '"Eager Violin'},
    ),
    "a TSV that is quoted": case(
        {"p.tsv": quoted(titled(i2="Brisk\tHarbour"), delimiter="\t").encode()}
    ),
    "semicolons, CRLF and quotes in windows-1252": case(
        {
            "r.csv": quoted(
                titled(i2="Caf\u00e9 \u20ac; part 2"), delimiter=";", quoting=csv.QUOTE_ALL
            ).encode("cp1252")
        },
        {},
        {"2": "Caf\u00e9 \u20ac; part 2"},
    ),
    "the same, declared": case(
        {"r.csv": quoted(titled(i2="Caf\u00e9; 2"), delimiter=";").encode("cp1252")},
        {"encoding": "cp1252", "separator": ";"},
        {"2": "Caf\u00e9; 2"},
    ),
    "a byte order mark and semicolons": case(
        {"r.csv": text(titled(i2="Caf\u00e9"), ";", end="\r\n").encode("utf-8-sig")},
        {},
        {"2": "Caf\u00e9"},
    ),
    "a byte order mark with UTF-8 by another name": case(
        {"r.csv": text().encode("utf-8-sig")}, {"encoding": "UTF8"}
    ),
    "tabs in a CSV": case({"r.csv": text(ROWS, "\t").encode()}),
    "bars": case({"r.csv": text(ROWS, "|").encode()}),
    "two colons in one file of any name": case({"r.txt": text(ROWS, "::").encode()}),
    "UTF-16 of a spreadsheet": case({"r.csv": text(ROWS, "\t", end="\r\n").encode("utf-16")}),
    "a backslash before a quote": case(
        {
            "r.csv": text(
                [(*row[:3], f'"{row[3]}"') for row in titled(i2='Brisk \\"B, C\\" Harbour')]
            ).encode()
        },
        {},
        {"2": 'Brisk "B, C" Harbour'},
    ),
    "single quotes, declared": case(
        {"r.csv": quoted(titled(i2="Brisk, Harbour"), quotechar="'").encode()},
        {"quote": "'"},
        {"2": "Brisk, Harbour"},
    ),
    "bars around fields, declared": case(
        {"r.csv": quoted(titled(i2="Brisk, Harbour"), quotechar="|").encode()},
        {"quote": "|"},
        {"2": "Brisk, Harbour"},
    ),
    "no header": case(
        {"r.csv": text(header=()).encode()}, {"header": ("user", "item", "at", "name")}
    ),
    "blank lines": case(
        {"r.csv": text().replace("\n1,", "\n\n1,").replace("\n2,", "\n  \n2,").encode() + b"\n\n"}
    ),
    "blank lines among quotes": case(
        {
            "r.csv": b"\n"
            + quoted(titled(i2="Brisk\nHarbour")).replace("\r\n1,", "\r\n\r\n1,").encode()
        }
    ),
    "blank lines in JSON": case(
        {"p.jsonl": "\n\n".join(map(json.dumps, objects())).encode() + b"\n\n"}
    ),
    "one JSON array": case({"p.json": json.dumps(objects()).encode()}),
    "JSON arrays in shards, printed": case(
        {
            f"{n}.json": json.dumps(objects(ROWS[n::3]), indent=1).encode("utf-8-sig")
            for n in range(3)
        }
    ),
    "a packed table beside packed items": case(
        {
            "interactions.csv.gz": gzip.compress(text(PAIRS, header=HEADER[:3]).encode()),
            "items.csv.gz": gzip.compress(quoted(ITEMS, header=("item", "title")).encode()),
        }
    ),
    "ids that were floats here and there": case(
        {
            "r.csv": text(
                [(f"{u}.0", i if n % 2 else f"{i}.0", t, x) for n, (u, i, t, x) in enumerate(ROWS)]
            ).encode()
        }
    ),
    "floats where the items have whole numbers": case(
        {
            "plays.csv": text(
                [(f"{u}.0", f"{i}.0", f"{t}.0") for u, i, t in PAIRS], header=HEADER[:3]
            ).encode(),
            "titles.csv": text(ITEMS, header=("item_id", "title")).encode(),
        }
    ),
    "UTF-8 where MovieLens has latin-1": case(
        {
            "u.data": text([(u, i, "4", t) for u, i, t in PAIRS], "\t", ()).encode(),
            "u.item": "".join(
                f"{i}|{AMELIE if i == '5' else x} (1995){'|' * 22}\n" for i, x in ITEMS
            ).encode(),
        },
        {},
        {"5": AMELIE},
    ),
    "MovieLens-1M without its users": case(
        {
            "ratings.dat": text([(u, i, "4", t) for u, i, t in PAIRS], "::", ()).encode(),
            "movies.dat": "".join(
                f"{i}::{AMELIE if i == '5' else x} (1995)::Drama\n" for i, x in ITEMS
            ).encode("latin-1"),
        },
        {},
        {"5": AMELIE},
    ),
    "what is called as MovieLens calls it": case(
        {
            "ratings.csv": text(PAIRS, header=("reader", "isbn", "at")).encode(),
            "movies.csv": text(ITEMS, header=("isbn", "name")).encode(),
        }
    ),
    "milliseconds": case({"r.csv": text(dated(lambda t: f"{t}000")).encode()}),
    "microseconds": case({"r.csv": text(dated(lambda t: f"{t}000000")).encode()}),
    "nanoseconds": case({"r.csv": text(dated(lambda t: f"{t}000000000")).encode()}),
    "ISO with Z": case({"r.csv": text(dated(utc("%Y-%m-%dT%H:%M:%SZ"))).encode()}),
    "ISO with an offset": case({"r.csv": text(dated(two_hours_on)).encode()}),
    "ISO with UTC": case({"r.csv": text(dated(utc("%Y-%m-%d %H:%M:%S UTC"))).encode()}),
    "ISO with a comma": case({"r.csv": text(dated(utc("%Y-%m-%d %H:%M:%S,000")), ";").encode()}),
    "day, month, year": case({"r.csv": text(dated(utc("%d/%m/%Y %H:%M:%S"))).encode()}),
    "month, day, year": case({"r.csv": text(dated(utc("%m/%d/%Y %I:%M:%S %p"))).encode()}),
    "milliseconds and a rating nobody asked for": case(
        {
            "r.csv": text(
                [(*row[:2], f"{row[2]}000", row[3], "1") for row in ROWS], header=(*HEADER, "stars")
            ).encode()
        }
    ),
    "months by name": case({"r.tsv": text(dated(utc("%b %d, %Y %H:%M:%S")), "\t").encode()}),
    "a format of its own": case(
        {"r.csv": text(dated(utc("%Y%m%d-%H%M%S"))).encode()}, {"time_unit": "%Y%m%d-%H%M%S"}
    ),
}


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder if len(files) > 1 else folder / next(iter(files))


@pytest.mark.parametrize("name", SAME)
def test_one_log_in_many_shapes(tmp_path: Path, name: str) -> None:
    files, config, other_titles = SAME[name]
    items, rows, rejects = read(write(tmp_path, files), TableConfig(**config))
    assert rejects == []
    assert dict(zip(items.ids, items.titles, strict=True)) == TITLES | other_titles
    assert sorted((user, item, time) for user, item, _, time in rows) == sorted(EVENTS)


@pytest.mark.parametrize("name", SAME)
def test_what_was_found_said_aloud_reads_the_same(tmp_path: Path, name: str) -> None:
    """The settings that are printed are those that would say it, file by file."""
    files, config, _ = SAME[name]
    location = write(tmp_path, files)
    found = sources.find(str(location), TableConfig(**config))
    said = dict(config)
    for line in found.found.values():
        words = shlex.split(line.partition(" (")[0])
        assert words[::2] == ["--set"] * (len(words) // 2)
        said |= dict(word.removeprefix("data.table.").split("=", 1) for word in words[1::2])
    if found.items and found.layout.name == "table":
        said.setdefault("items", found.items[0].name)
    again = sources.find(str(location), TableConfig(**said)).found
    assert all(line.startswith("(stars is not used;") for line in again.values())
    assert read(location, TableConfig(**said))[:2] == read(location, TableConfig(**config))[:2]


CONTENT = text().encode()


def test_what_is_no_id_is_rejected_with_its_line(tmp_path: Path) -> None:
    """NaN of JSON, of Parquet's floats and of text; and a setting that has them back."""
    rows = objects(ROWS[:7])
    for row in rows[::3]:
        row["user_id"] = float("nan")
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {name: [row[name] for row in rows] for name in HEADER}
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "p" / "p.parquet")
    lines = [("nan" if n % 3 == 0 else row[0], *row[1:]) for n, row in enumerate(ROWS[:7])]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "p.csv").write_text(text(lines))
    for kind, first, value in (("j", 1, ""), ("p", 1, ""), ("t", 2, "nan")):
        _, found, rejects = read(tmp_path / kind)
        assert [row[0] for row in found] == ["1"] * 4
        assert [(r.line, r.reason, r.value) for r in rejects] == [
            (first + n, "empty id", value) for n in (0, 3, 6)
        ]
    assert "nan" in {row[0] for row in read(tmp_path / "t", TableConfig(missing=()))[1]}


def test_folding_is_counted_and_can_be_switched_off(tmp_path: Path) -> None:
    floats = text([(f"{u}.0", f"{i}.0", t) for u, i, t in PAIRS], header=HEADER[:3])
    titles = text(ITEMS, header=("item_id", "title"))
    write(tmp_path, {"plays.csv": floats.encode(), "titles.csv": titles.encode()})
    assert changes(tmp_path, TableConfig())[FOLDED] == (2 * len(EVENTS), "1.0")
    items, rows, rejects = read(tmp_path, TableConfig(fold_ids=False))
    assert (rows, len(rejects)) == ([], len(EVENTS))
    table = sources.find(str(tmp_path), TableConfig(fold_ids=False)).layout.interactions
    assert hint_of(rejects[0], table, items.ids, "titles.csv") == (
        "; titles.csv has '4': --set data.table.fold_ids=true makes them one"
    )


def changes(location: Path, config: TableConfig) -> dict[str, Any]:
    """What is done to the values of a location."""
    items = read(location, config)[0]
    data = sources.find(str(location), config)
    parts = [
        part.changes
        for chunk in tables.chunks_of(data.interactions, data.layout.interactions)
        for part in raw.read_interactions(chunk, data.layout.interactions, pa.array(items.ids))
    ]
    return raw.sum_changes([items.changes, *parts])


@pytest.mark.parametrize("beside", [True, False])
def test_years_and_entities_of_titles(tmp_path: Path, beside: bool) -> None:
    named = {"1": "Doom (1991)", "2": "Doom (1992)", "3": "Doom (1993)", "4": "Tom &amp; Jerry"}
    rows = titled(**{f"i{item}": title for item, title in named.items()})
    titles = (TITLES | named).items()
    files = {"r.csv": text(rows).encode()}
    if not beside:
        files = {
            "r.csv": text(PAIRS, header=HEADER[:3]).encode(),
            "t.csv": text(titles, header=("item_id", "title")).encode(),
        }
    place = write(tmp_path, files)
    for config, doom, tom, seen in (
        (TableConfig(domain="game"), "Doom (1991)", "Tom &amp; Jerry", {ENTITIES}),
        (TableConfig(domain="movie"), "Doom", "Tom &amp; Jerry", {ENTITIES, YEARS}),
        (TableConfig(domain="movie", years="keep"), "Doom (1991)", "Tom &amp; Jerry", {ENTITIES}),
        (TableConfig(years="strip", unescape=True), "Doom", "Tom & Jerry", {ENTITIES, YEARS}),
    ):
        assert [read(place, config)[0].titles[i] for i in (0, 3)] == [doom, tom]
        found = changes(place, config)
        assert found.keys() == seen
        assert found[ENTITIES] == (1, "Tom &amp; Jerry")
        assert found.get(YEARS, (3, "Doom (1991)")) == (3, "Doom (1991)")


def test_what_else_is_done_to_titles_is_counted(tmp_path: Path) -> None:
    rows = titled(i1="Matrix, The", i2="", i3="unknown")
    place = write(tmp_path, {"r.tsv": text(rows, "\t").encode()})
    assert read(place)[0].titles[:3] == ["The Matrix", "item 2", "item 3"]
    found = changes(place, TableConfig())
    assert found == {ARTICLES: (1, "Matrix, The"), NAMELESS: (2, "item 2")}
    kept = TableConfig(move_articles=False)
    assert read(place, kept)[0].titles[0] == "Matrix, The"
    assert changes(place, kept).keys() == {NAMELESS}


@pytest.mark.parametrize(
    ("reason", "value", "hint"),
    [
        ("bad time", "1585699200000", "milliseconds: --set data.table.time_unit=milliseconds"),
        ("bad time", "1585699200000000000", "nanoseconds: --set data.table.time_unit=nanoseconds"),
        ("bad time", "2020-03-31 10:00 UTC", "iso8601: --set data.table.time_unit=iso8601"),
        ("bad time", "31/12/2020", "%d/%m/%Y: --set data.table.time_unit=%d/%m/%Y"),
        ("bad time", "noon", "; say its format, such as --set data.table.time_unit=%d/%m/%Y"),
        ("unknown item", "I7", "; the catalogue has 'i7'"),
        ("unknown item", "x", "; the catalogue has ids such as 'i1'"),
        ("broken quotes", '1,"A', "quotes are just text: --set data.table.quote=none"),
        ("wrong column count", "1,2", ""),
        ("undecodable text at byte 3 of a field", "x", "--set data.table.encoding=cp1252"),
        ("bad rating", "9", "; choose a number from 0 to 5"),
        ("no JSON object", "[]", "; write one object a line, or one array of them"),
    ],
)
def test_a_reason_has_one_hint(reason: str, value: str, hint: str) -> None:
    table = TableFormat(files="r.csv", columns={}, quote='"', time_unit="seconds", max_rating=5.0)
    found = hint_of(Reject("r.csv", 2, reason, value), table, ["i1", "i7"], "")
    assert found.endswith(hint)
    assert bool(found) == bool(hint)


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (
            CONTENT,
            {"user": "viewer"},
            r"no column 'viewer'; it has user_id, .*table\.user=user_id$",
        ),
        (
            text(header=("a", "b", "c", "d")).encode(),
            {},
            r"usual columns of a user; it has a, b, c, d",
        ),
        (text(PAIRS, header=HEADER[:3]).encode(), {}, r"the table that has them: .*items=FILE$"),
        (
            text(dated(lambda t: "03/04/2020")).encode(),
            {},
            r"'03/04/2020', which may be %d/%m/%Y or",
        ),
        (b"", {}, r"r\.csv has none of the usual columns of a user; it is empty"),
    ],
)
def test_columns_that_nobody_can_tell(
    tmp_path: Path, content: bytes, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        sources.find(str(tmp_path / "r.csv"), TableConfig(**config))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoding", "utf-9", "'utf-9', which is no encoding of text"),
        ("encoding", "base64", "'base64', which is no encoding of text"),
        ("separator", "", "should have at least 1 character"),
        ("separator", "-----", "should have at most 4 characters"),
        ("quote", "''", r"should match pattern '\^\(auto\|none"),
        ("time_unit", "weeks", r"should match pattern '\^\(auto\|seconds\|milli"),
    ],
)
def test_settings_that_mean_nothing(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.table\.{name} is .*{message}"):
        replace_in(Experiment(), {f"data.table.{name}": value})


def test_eight_digits_are_a_day(tmp_path: Path) -> None:
    write(tmp_path, {"r.csv": text(dated(utc("%Y%m%d"))).encode()})
    times = sorted(row[3] for row in read(tmp_path)[1])
    assert times == sorted(time - time % 86_400 for _, _, time in EVENTS)


def test_a_date_decides_wherever_it_stands(tmp_path: Path) -> None:
    """One 13th of a month is enough, in the last line of the last shard."""
    lines = dated(lambda t: "03/04/2020 10:00")
    write(
        tmp_path,
        {
            "a.csv": text(lines).encode(),
            "b.csv": text([*lines, ("9", "1", "13/04/2020 10:00", "Amber Lantern")]).encode(),
        },
    )
    assert (
        sources.find(str(tmp_path), TableConfig()).layout.interactions.time_unit == "%d/%m/%Y %H:%M"
    )


def test_an_array_that_is_not_whole(tmp_path: Path) -> None:
    whole = json.dumps([*objects(ROWS[:2]), 7, *objects(ROWS[2:3])])
    (tmp_path / "p.json").write_text(whole)
    _, rows, rejects = read(tmp_path)
    assert (len(rows), rejects) == (3, [Reject("p.json", 3, "no JSON object", "7")])
    (tmp_path / "p.json").write_text(whole[:-9])
    with pytest.raises(DataError, match=r"p\.json is no whole JSON array; after 3 elements: "):
        read(tmp_path)


LAYOUT = """
[[source]]
name = "Books"
split = "time"
[source.interactions]
files = "ratings.tsv"
columns = { user = "reader", item = "isbn", rating = "stars", time = "at" }
[source.items]
files = "books.tsv"
columns = { item = "isbn", title = "name" }
"""


def test_a_layout_of_ones_own_lies_anywhere(tmp_path: Path) -> None:
    rows = [(u, i, "4", t) for u, i, t in PAIRS]
    files = {
        "data/ratings.tsv": text(rows, "\t", ("reader", "isbn", "stars", "at")).encode(),
        "data/books.tsv": text(ITEMS, "\t", ("isbn", "name")).encode(),
        "elsewhere/books.toml": LAYOUT.encode(),
    }
    write(tmp_path, files)
    layout = tmp_path / "elsewhere" / "books.toml"
    data = sources.find(str(tmp_path / "data"), TableConfig(), str(layout))
    assert (data.layout.name, data.layout.split, data.known) == ("Books", "time", False)
    assert data.layout.interactions.columns["rating"] == "stars"
    for wrong, message in (
        ("colums = { }", "says 'colums'; known are files, columns"),
        ("columns = 5", "columns is 5"),
        ("columns = {", "cannot be read"),
    ):
        layout.write_text(LAYOUT.replace('columns = { item = "isbn", title = "name" }', wrong))
        with pytest.raises(ConfigError, match=message):
            sources.find(str(tmp_path / "data"), TableConfig(), str(layout))
    with pytest.raises(ConfigError, match="cannot be read"):
        sources.find(str(tmp_path / "data"), TableConfig(), str(tmp_path / "none.toml"))


def test_the_pieces_a_file_is_read_in_change_nothing(tmp_path: Path) -> None:
    torn = quoted(titled(i3='Calm, "Mea\ndow"')).replace("\r\n4,", '\r\n"4,\r\n\r\n4,', 3)
    (tmp_path / "r.csv").write_bytes(torn.encode())
    whole = read(tmp_path)
    assert {reject.reason for reject in whole[2]} == {"broken quotes"}
    assert len(whole[1]) == len(EVENTS)
    for size in (1, 7, 50, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "CHUNK_BYTES", size)
            patch.setattr(files, "PIECE_BYTES", max(1, size // 3))
            assert read(tmp_path) == whole


LINES = st.sampled_from(
    [
        *(
            "1,2,5,A",
            '1,2,5,"A"',
            '1,2,5,"A, B"',
            '1,2,5,"A ""B"""',
            "",
            "  ",
            '"',
            '1,2,5,"A',
            'B"',
        ),
        *(
            '"1,2,5,A',
            '1,2,5,5" pipe',
            '1,2,5,"a"b',
            "1,2,5",
            '1,2,5,"A\nB"',
            '"1\n2",2,5,A',
            ",2,5,A",
        ),
        *('1,2,5,a"b,"c', "x\ry,2,5,A", '"1",2,"5",""', '"1",2,5,"A"\r', '"1,2,5,A"'),
    ]
)


@settings(max_examples=80, deadline=None)
@given(st.lists(LINES, max_size=12), st.integers(1, 60), st.sampled_from([20, 1 << 20]))
def test_no_line_is_lost_whatever_its_quotes(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int, longest: int
) -> None:
    """Each physical line is in a row, a reject or blank; in pieces of any size, all the same."""
    folder = tmp_path_factory.mktemp("raw")
    body = "".join(f"{line}\n" for line in [*lines, "1,2,5,Z"])
    (folder / "r.csv").write_bytes(f"{','.join(HEADER)}\n{body}".encode())
    config = TableConfig(quote='"', escape="none", separator=",")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "RECORD_BYTES", longest)
        found.append(_lines(folder, config))
        patch.setattr(tables, "CHUNK_BYTES", size)
        patch.setattr(files, "PIECE_BYTES", max(1, size // 3))
        found.append(_lines(folder, config))
    assert found[0] == found[1]
    numbers, broken, spans, _ = found[0]
    physical = body.removesuffix("\n").split("\n")
    blank = {n for n, line in enumerate(physical, start=2) if not line.strip(" \r")}
    inside = {first + extra for first, span in spans for extra in range(span)}
    assert inside | broken | blank == set(range(2, 2 + len(physical)))
    assert not inside & broken
    assert len(numbers) == len(set(numbers))


def _lines(
    folder: Path, config: TableConfig
) -> tuple[list[int], set[int], list[tuple[int, int]], list[dict[str, bytes]]]:
    """Line numbers of rows, of broken lines, how many lines each row's texts fill, and the rows."""
    data = sources.find(str(folder), config)
    numbers: list[int] = []
    broken: set[int] = set()
    spans: list[tuple[int, int]] = []
    found: list[dict[str, bytes]] = []
    for _, first, piece in tables.read_all(data.interactions, data.layout.interactions):
        rows = piece.columns.to_pylist()
        found += rows
        for line, row in zip(piece.lines, rows, strict=True):
            spans.append((first + line, 1 + sum(text.count(b"\n") for text in row.values())))
        numbers += [first + line for line in piece.lines]
        broken |= {first + line for line in piece.broken}
    return numbers, broken, spans, found


@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\x00"))] * 2)))
@settings(max_examples=100, deadline=None)
def test_what_python_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    """Any texts at all, quoted as RFC 4180 has it."""
    folder = tmp_path_factory.mktemp("raw")
    rows = [("u", str(n), "5", *pair) for n, pair in enumerate(texts)]
    content = quoted(rows, header=(*HEADER, "more"), quoting=csv.QUOTE_ALL)
    (folder / "r.csv").write_bytes(content.encode())
    table = sources.find(
        str(folder), TableConfig(separator=",", quote='"', escape="none", time_unit="seconds")
    )
    found = [
        row["title"].decode()
        for _, _, piece in tables.read_all(table.interactions, table.layout.interactions)
        for row in piece.columns.to_pylist()
    ]
    assert found == [title for title, _ in texts]
