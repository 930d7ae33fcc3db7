"""Every layout gives the same rows, and every line is used or rejected with its number."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_folders import (
    read,
    write_csv,
    write_dat,
    write_grouplens,
    write_lines,
    write_parquet,
    write_recbole,
)

from rsllm.config import TableConfig
from rsllm.data import files, sources, tables
from rsllm.data.account import check_rejects
from rsllm.data.files import Reject
from rsllm.data.raw import read_items
from rsllm.errors import ConfigError, DataError

Write = Callable[[Path, list[str], dict[str, str]], Path]
ITEMS = {"1": "Toy Story (1995)", "2": "Matrix, The (1999)", "3": "Am\u00e9lie (2001)"}
GOOD = "7\t1\t4\t880000000"
BROKEN = {
    "7\t1\t4": "wrong column count",
    "7\t1\t4\t880000000\t": "wrong column count",
    "\t1\t4\t880000000": "empty id",
    "7\t1\t5.5\t880000000": "bad rating",
    "7\t1\t-1\t880000000": "bad rating",
    "7\t1\tnan\t880000000": "bad rating",
    "7\t1\t4\t-880000000": "bad time",
    "7\t1\t4\t880000000000": "bad time",
    "7\t1\t4\t" + "9" * 5000: "bad time",
    "7\t1\t4\tnoon": "bad time",
    "7\t9\t4\t880000000": "unknown item",
}
PLAIN = TableConfig()


@pytest.mark.parametrize("write", [write_grouplens, write_recbole, write_dat, write_csv])
def test_known_layouts_give_the_same_rows(tmp_path: Path, write: Write) -> None:
    items, rows, rejects = read(write(tmp_path, [GOOD, "8\t3\t2.5\t0"], ITEMS))
    assert items.ids == ["1", "2", "3"]
    assert items.titles == ["Toy Story", "The Matrix", "Am\u00e9lie"]
    assert rows == [("7", "1", 4.0, 880000000), ("8", "3", 2.5, 0)]
    assert rejects == []


def test_an_earlier_edition_is_latin_1(tmp_path: Path) -> None:
    write_dat(tmp_path, [GOOD], ITEMS)
    (tmp_path / "users.dat").write_text("7::F::1::10::48067\n")
    (tmp_path / "movies.dat").write_bytes("3::Am\u00e9lie (2001)::Comedy\n".encode("latin-1"))
    data = sources.find(str(tmp_path), PLAIN)
    assert data.layout.name == "MovieLens-1M"
    assert read_items(data.items, data.layout.items).titles == ["Am\u00e9lie"]


def test_typed_parquet_with_titles_beside(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "data [v2] (new)", [GOOD, "8\t3\t2.5\t0"], ITEMS)
    (folder / "_SUCCESS.csv").touch()
    (folder / ".watched.parquet.crc").touch()
    items, rows, rejects = read(folder, TableConfig(rating="rating"))
    assert (items.ids, items.titles) == (["1", "3"], ["Toy Story (1995)", "Am\u00e9lie (2001)"])
    assert rows == [("7", "1", 4.0, 880000000), ("8", "3", 2.5, 0)]
    assert rejects == []


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("unit", ["seconds", "milliseconds", "iso8601"])
def test_times_are_kept_to_the_millisecond(tmp_path: Path, typed: bool, unit: Any) -> None:
    """A second before 2106, an odd millisecond, and a whole second."""
    times = [4_294_967_295_999, 1_700_000_000_123, 880_000_000_000]
    stamps = [datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=time) for time in times]
    if typed:
        names = ("user_id", "item_id", "timestamp", "title")
        columns = (["u"] * 3, [7] * 3, pa.array(stamps, pa.timestamp("us", "UTC")), ["A"] * 3)
        pq.write_table(pa.table(dict(zip(names, columns, strict=True))), tmp_path / "a.parquet")
    else:
        texts = {
            "seconds": [f"{time // 1000}.{time % 1000:03}" for time in times],
            "milliseconds": map(str, times),
            "iso8601": [stamp.isoformat() for stamp in stamps],
        }
        lines = [f"u,7,{text},A" for text in texts[unit]]
        write_lines(tmp_path / "a.csv", ["user_id,item_id,timestamp,title", *lines])
    _, rows, rejects = read(tmp_path, TableConfig(time_unit=unit))
    assert ([row[3] for row in rows], rejects) == ([time / 1000 for time in times], [])


def test_an_item_whose_quotes_do_not_close_costs_one_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp", "u,8,5"])
    titles = ["item_id,title", '7,"A', "8,B", '9,"C, D"']
    write_lines(tmp_path / "titles.csv", titles)
    items, _, rejects = read(tmp_path / "log.csv", TableConfig(items=str(tmp_path / "titles.csv")))
    assert items.titles == ["B", "C, D"]
    assert rejects == [Reject("titles.csv", 2, "broken quotes", '7,"A')]


def _strangers_lines(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "literals":
        return "".join(f"{row!r}\n" for row in rows).encode()
    separator = "," if kind == "csv" else "\t"
    lines = [separator.join(rows[0])]
    lines += [separator.join(f'"{value}"' for value in row.values()) for row in rows]
    return "\r\n".join([*lines, ""]).encode("utf-8-sig")


@pytest.mark.parametrize("packed", [False, True])
def test_steam_dumps_are_python_literals(tmp_path: Path, packed: bool) -> None:
    reviews = [
        {"username": "Ann's", "product_id": "10", "date": "2017-12-17", "text": "a 'fine' game"},
        {"username": "bob", "product_id": "20", "date": "2018-01-01", "hours": 0.1},
    ]
    games = [
        {"id": "10", "app_name": "Counter-Strike", "price": 9.99},
        {"id": "20", "app_name": "Half::Life\u2122", "tags": ["FPS"]},
    ]
    for name, rows in (("reviews", reviews), ("games", games)):
        content = "".join(f"{row!r}\n".replace("{'", "{u'") for row in rows).encode()
        content += b"" if name == "games" else b"{broken\n"
        path = tmp_path / f"steam_{name}.json{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    items, found, rejects = read(tmp_path)
    assert items.titles == ["Counter-Strike", "Half::Life\u2122"]
    assert found == [("Ann's", "10", None, 1513468800), ("bob", "20", None, 1514764800)]
    file = f"steam_reviews.json{'.gz' if packed else ''}"
    assert rejects == [Reject(file, 3, "no JSON object", "{broken")]


def test_last_fm_layouts(tmp_path: Path) -> None:
    tags = ["userID\tartistID\ttagID\ttimestamp", "2\t52\t13\t1238536800000"]
    write_lines(tmp_path / "a" / "user_taggedartists-timestamps.dat", tags)
    artists = ["id\tname\turl\tpictureURL", "52\tMorcheeba\thttp://a\thttp://b"]
    write_lines(tmp_path / "a" / "artists.dat", artists)
    items, found, _ = read(tmp_path / "a")
    assert (items.titles, found) == (["Morcheeba"], [("2", "52", None, 1238536800)])
    plays = [
        'user_1\t2009-05-04T23:08:57Z\tf1b1\tDeep "Dish\t\tSet',
        "user_1\t2009-05-05T00:00:00Z\t\t\t\tX",
    ]
    write_lines(tmp_path / "b" / "userid-timestamp-artid-artname-traid-traname.tsv", plays)
    items, found, rejects = read(tmp_path / "b")
    assert items.titles == ['Deep "Dish']
    assert found == [("user_1", 'Deep "Dish', None, 1241478537)]
    assert [(reject.line, reject.reason) for reject in rejects] == [(2, "empty id")]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("csv", ".csv"), ("tsv", ".tsv"), ("jsonl", ".jsonl"), ("literals", ".json")],
)
def test_a_strangers_table(tmp_path: Path, kind: str, suffix: str, packed: bool) -> None:
    rows = [
        {"who": "ann, b", "what": "x1", "when": "2020-02-29T12:00:00Z", "name": "Dune, Part One"},
        {"who": "bob", "what": "x2", "when": "2020-03-01", "name": "Caf\u00e9 \U0001f600"},
    ]
    config = TableConfig(
        user="who", item="what", time="when", title="name", time_unit="iso8601", domain="movie"
    )
    content = _strangers_lines(kind, rows)
    path = tmp_path / f"log{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    expected = [("ann, b", "x1", None, 1582977600), ("bob", "x2", None, 1583020800)]
    for location in (path, tmp_path, f"file://{path}"):
        items, found, rejects = read(location, config)
        assert items.titles == ["Dune, Part One", "Caf\u00e9 \U0001f600"]
        assert (found, rejects) == (expected, [])


def test_a_table_of_items_is_looked_for_beside_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, title in (("here", "Wrong"), ("data", "Right")):
        write_lines(tmp_path / folder / "titles.csv", ["item_id,title", f"7,{title}"])
    write_lines(tmp_path / "data" / "log.csv", ["user_id,item_id,timestamp", "u,7,5"])
    monkeypatch.chdir(tmp_path / "here")
    assert read(tmp_path / "data", TableConfig(items="titles.csv"))[0].titles == ["Right"]
    (tmp_path / "data" / "titles.csv").unlink()
    assert read(tmp_path / "data", TableConfig(items="titles.csv"))[0].titles == ["Wrong"]


def test_titles_in_a_table_of_their_own_with_texts(tmp_path: Path) -> None:
    write_lines(tmp_path / "log" / "a.csv", ["user_id,item_id,timestamp", "u,7,5"])
    write_lines(tmp_path / "log" / "b.csv", ["user_id,item_id,timestamp", "v,7,6", "u,8,7"])
    titles = ["item_id,title,genre", '7,"A ""fine"" film\nin two lines",Drama', "8,Plain,"]
    write_lines(tmp_path / "titles.csv", titles)
    config = TableConfig(items=str(tmp_path / "titles.csv"), text=("genre",))
    items, rows, rejects = read(tmp_path / "log", config)
    assert items.titles == ['A "fine" film in two lines (Drama)', "Plain"]
    assert rows == [("u", "7", None, 5), ("v", "7", None, 6), ("u", "8", None, 7)]
    assert rejects == []


def test_inside_an_archive(tmp_path: Path) -> None:
    write_grouplens(tmp_path / "ml", [GOOD], ITEMS)
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        for name in ("u.data", "u.item"):
            archive.write(tmp_path / "ml" / name, f"ml-100k/{name}")
    items, rows, _ = read(f"zip://ml-100k::{tmp_path / 'ml.zip'}")
    assert len(items.ids) == 3
    assert rows == [("7", "1", 4.0, 880000000)]


def test_movielens_titles(movielens_items: Path, tmp_path: Path) -> None:
    (tmp_path / "u.item").write_bytes(movielens_items.read_bytes())
    (tmp_path / "u.data").write_text(f"{GOOD}\n")
    titles = read(tmp_path)[0].titles
    assert (len(titles), len(set(titles))) == (1682, 1659)
    assert {"An Affair to Remember", "Mis\u00e9rables, Les", "item 267"} <= set(titles)


def test_movielens_is_the_same_in_both_layouts(recbole: Path, grouplens: Path) -> None:
    items, rows, rejects = read(grouplens)
    other, *same = read(recbole)
    assert (replace(items, changes=other.changes), rows, rejects) == (other, *same)
    assert items.changes["years taken off"][0] == 1681, "RecBole has taken off all but one"
    assert (len(items.ids), len(rows), len(set(items.titles))) == (1682, 100_000, 1659)
    u_data = hashlib.sha256((grouplens / "u.data").read_bytes()).hexdigest()
    assert u_data == "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([GOOD, *BROKEN]), max_size=30),
    st.sampled_from([write_grouplens, write_csv, write_recbole]),
    st.integers(1, 200),
)
def test_every_line_is_used_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], write: Write, size: int
) -> None:
    """In chunks of any size, and pieces smaller than those."""
    lines = [*lines, GOOD]
    folder = write(tmp_path_factory.mktemp("raw"), lines, ITEMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHUNK_BYTES", size)
        patch.setattr(files, "PIECE_BYTES", max(1, size // 3))
        _, rows, rejects = read(folder)
    first = 1 if write is write_grouplens else 2
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (number, BROKEN[line]) for number, line in enumerate(lines, start=first) if line in BROKEN
    ]
    assert rows == [("7", "1", 4.0, 880000000)] * lines.count(GOOD)


@pytest.mark.parametrize("quoted", [True, False])
def test_a_lone_carriage_return_costs_one_line(tmp_path: Path, quoted: bool) -> None:
    last = '6,x,5,"A\rB"' if quoted else "6,x,5,A"
    lines = ["1,x,5,A\r", "2,x,5,A\rB", "3\r,x,5,A", "4,x\r", last]
    (tmp_path / "log.csv").write_bytes(
        "\n".join(["user_id,item_id,timestamp,title", *lines]).encode()
    )
    _, rows, rejects = read(tmp_path)
    assert [row[0] for row in rows] == ["1", "6"]
    broken = {3: "2,x,5,A\rB", 4: "3\r,x,5,A", 5: "4,x"}
    assert rejects == [
        Reject("log.csv", line, "wrong column count", value) for line, value in broken.items()
    ]
    write_dat(tmp_path / "dat", ["1\t1\t4\t5", "2\t1\r\t4\t5", "3\t1\t4\t5"], ITEMS)
    _, rows, rejects = read(tmp_path / "dat")
    assert [row[0] for row in rows] == ["1", "3"]
    assert rejects == [Reject("ratings.dat", 2, "wrong column count", "2::1\r::4::5")]


def test_carriage_returns_as_line_ends_are_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"user_id,item_id,timestamp,title\ru,7,5,A\r")
    with pytest.raises(ConfigError, match=r"log\.csv has carriage returns for line ends; convert"):
        read(tmp_path)


def test_quotes_that_do_not_close_cost_one_line(tmp_path: Path) -> None:
    lines = ["1,x,5,A", '"2,x,5,A', "3,x,5,A", '4",x,5,A', '"5",x,5,A', '"6,",x,5,"A ""B"""']
    write_lines(tmp_path / "log.csv", ["user_id,item_id,timestamp,title", *lines])
    _, rows, rejects = read(tmp_path)
    assert [row[0] for row in rows] == ["1", "3", '4"', "5", "6,"]
    assert rejects == [Reject("log.csv", 3, "broken quotes", '"2,x,5,A')]


def test_undecodable_text(tmp_path: Path) -> None:
    folder = write_recbole(tmp_path, [GOOD, GOOD], ITEMS)
    with (folder / "ml-100k.item").open("ab") as file:
        file.write(b"4\tAm\xe9lie\t2001\tDrama\r\n")
    with (folder / "ml-100k.inter").open("ab") as file:
        file.write(b"Andr\xe9\t1\t4\t5\r\nAndr\xc3\xa9\t1\t4\t5\r\n")
    _, rows, rejects = read(folder)
    assert rejects == [
        Reject("ml-100k.item", 5, "undecodable text at byte 2 of a field", "4, Am\\xe9lie"),
        Reject("ml-100k.inter", 4, "undecodable text at byte 4 of a field", "Andr\\xe9"),
    ]
    assert rows[-1][0] == "Andr\u00e9"
    with (folder / "ml-100k.inter").open("ab") as file:
        file.write(b"Andr\xe9\t1\t4\r\n")
    _, again, more = read(folder, TableConfig(encoding="utf-8"))
    assert (again, more[:2]) == (rows, rejects)
    assert more[2] == Reject("ml-100k.inter", 6, "wrong column count", "Andr?\t1\t4")


def test_undecodable_json_costs_one_line(tmp_path: Path) -> None:
    good = {"user_id": "u", "item_id": 7, "timestamp": 5, "title": "Am\u00e9lie"}
    text = json.dumps(good, ensure_ascii=False)
    lines = [text.encode(), text.encode("latin-1")]
    lines += [json.dumps(good | {"user_id": "\ud800"}).encode(), b"[]", lines[0]]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    items, rows, rejects = read(tmp_path)
    assert (items.titles, [row[0] for row in rows]) == (["Am\u00e9lie"], ["u", "u"])
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (2, f"undecodable text at byte {lines[1].index(0xE9)} of the line"),
        (3, "undecodable text: half of a surrogate pair"),
        (4, "no JSON object"),
    ]
    assert [reject.value[-4:] for reject in rejects] == ['ie"}', 'ie"}', "[]"]
    assert "Am\\xe9lie" in rejects[0].value
    with pytest.raises(
        ConfigError, match=r"log\.jsonl has no column 'viewer'; it has user_id, item"
    ):
        read(tmp_path, TableConfig(user="viewer"))


@pytest.mark.parametrize("beside", [True, False])
def test_bytes_in_parquet_are_text_or_rejected(tmp_path: Path, beside: bool) -> None:
    texts = ["Am\u00e9lie".encode(), "Am\u00e9lie".encode("latin-1"), None]
    columns = {"user_id": ["u"] * 3, "item_id": [7, 8, 9], "timestamp": [5] * 3}
    titles = {"item_id": [7, 8, 9], "title": pa.array(texts, pa.large_binary())}
    pq.write_table(pa.table(columns | titles if beside else columns), tmp_path / "a.parquet")
    pq.write_table(pa.table(titles), tmp_path / "titles.parquet")
    config = TableConfig(items=str(tmp_path / "titles.parquet"))
    location = tmp_path / "a.parquet" if beside else tmp_path
    items, rows, rejects = read(location, PLAIN if beside else config)
    assert items.titles == ["Am\u00e9lie", "item 9"]
    assert [row[1] for row in rows] == ["7", "9"]
    assert "undecodable text" in rejects[0].reason


@pytest.mark.parametrize("location", ["nosuch://bucket/x", "dropbox://bucket/x"])
def test_uris_that_nothing_reads_are_refused(location: str) -> None:
    with pytest.raises(ConfigError, match=f"{location} cannot be read: "):
        sources.find(location, PLAIN)


@pytest.mark.parametrize("encoding", ["auto", "utf-16"])
def test_utf_16_is_read_whether_declared_or_not(tmp_path: Path, encoding: str) -> None:
    lines = ["user_id,item_id,timestamp,title", 'u,7,5,"Am\u00e9lie\n(2001)"']
    write_lines(tmp_path / "log.csv", lines, "utf-16")
    items, rows, _ = read(tmp_path, TableConfig(encoding=encoding))
    assert (items.titles, rows) == (["Am\u00e9lie (2001)"], [("u", "7", None, 5)])
    (tmp_path / "log.csv").write_bytes("\n".join(lines).encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"log\.csv is no utf-16 text"):
        read(tmp_path, TableConfig(encoding=encoding))


def test_too_many_rejects_name_count_reasons_place_and_way_out(tmp_path: Path) -> None:
    rejects = [Reject("u.data", 2, "bad rating", "9")] * 2
    rejects += [Reject("u.data", 9, "unknown item", "7")]
    listed = tmp_path / "rejects" / "x.jsonl"
    start = "3 of 7 rows rejected (2 bad rating, 1 unknown item); bad rating: '9' in u.data:2; rate"
    end = f" less; all: {listed}."
    with pytest.raises(DataError) as error:
        check_rejects(rejects, 7, 2, listed, hint="; rate less")
    assert str(error.value) == f"{start}{end} To go on without them: --set data.max_rejected_rows=3"
    with pytest.raises(DataError) as error:
        check_rejects(rejects, 7, 2, listed, hint="; rate less", useless=True)
    assert str(error.value) == f"{start}{end}"
    found = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["line"], line["value"]) for line in found] == [(2, "9"), (2, "9"), (9, "7")]
    check_rejects(rejects, 7, 3, listed)


def test_of_an_items_rows_the_first_one_counts(tmp_path: Path) -> None:
    folder = write_grouplens(tmp_path, [GOOD], ITEMS)
    with (folder / "u.item").open("a") as file:
        file.write("1|Toy Story (1995)" + "|" * 22 + "\n1|Heat (1995)" + "|" * 22 + "\n")
    items, rows, rejects = read(folder)
    assert (items.titles[0], len(rows)) == ("Toy Story", 1)
    place = "which is Toy Story (1995) in u.item:1"
    assert rejects == [
        Reject("u.item", 4, "repeated item", f"1 Toy Story (1995), {place}"),
        Reject("u.item", 5, "item with a second title", f"1 Heat (1995), {place}"),
    ]


def test_beside_the_interactions_the_most_frequent_title_counts(tmp_path: Path) -> None:
    lines = ["user_id,item_id,timestamp,title", "u,7,5,B", "v,7,5,A", "w,7,5,A", "w,8,5,C"]
    write_lines(tmp_path / "log.csv", lines)
    for location in (tmp_path, tmp_path / "log.csv"):
        items = read(location)[0]
        assert (items.ids, items.titles, items.other_titles) == (["7", "8"], ["A", "C"], 1)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no raw data; known layouts: MovieLens-100K"):
        read(tmp_path)
    write_lines(tmp_path / "a.csv", ["user_id,item_id,timestamp,title", "u,7,5,A"])
    write_lines(tmp_path / "b.csv", ["user_id,item_id,timestamp,name", "u,7,5,A"])
    with pytest.raises(ConfigError, match=r"b\.csv has no column 'title'; it has user_id"):
        read(tmp_path)
    (tmp_path / "b.csv").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"b\.csv has no column 'user_id'; it is empty\. Name"):
        read(tmp_path)
    (tmp_path / "b.csv").unlink()
    with pytest.raises(
        ConfigError, match=r"no column 'viewer'.*: --set data\.table\.user=user_id$"
    ):
        read(tmp_path, TableConfig(user="viewer"))
    (tmp_path / "c.tsv").touch()
    with pytest.raises(ConfigError, match="of several kinds"):
        read(tmp_path)


def test_shards_may_hold_other_columns_in_another_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.csv", ["user_id,item_id,timestamp,title", "u,7,5,A"])
    write_lines(tmp_path / "b.csv", ["item_id,more,timestamp,title,user_id", "7,x,5,A,v"])
    assert read(tmp_path)[1] == [("u", "7", None, 5), ("v", "7", None, 5)]


def test_drifting_and_damaged_parquet_is_named(tmp_path: Path) -> None:
    columns = {"user_id": ["u"], "item_id": [7], "timestamp": [5], "title": ["A"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", write_page_checksum=True)
    drifted = pa.table(columns | {"item_id": pa.array([7], pa.int32())})
    pq.write_table(drifted, tmp_path / "b.parquet")
    with pytest.raises(
        ConfigError, match=r"b\.parquet differs from a\.parquet in column 'item_id'"
    ):
        read(tmp_path)
    pq.write_table(pa.table(columns | {"more": [1]}), tmp_path / "b.parquet")
    assert len(read(tmp_path)[1]) == 2, "a column that is not asked for does not count"
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"b\.parquet is no whole Parquet file"):
        read(tmp_path)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[content.index(b"u", 4)] ^= 1
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.parquet is damaged"):
        read(tmp_path)
