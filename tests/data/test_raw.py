"""Titles, both layouts, and the exact accounting of broken lines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_folders import write_grouplens, write_recbole

from rsllm.data.raw import Reject, clean_title, raw_files, read
from rsllm.errors import ConfigError, DataError

Write = Callable[[Path, list[str], dict[str, str]], Path]
ITEMS = {"1": "Toy Story (1995)", "2": "Matrix, The (1999)", "3": "Am\u00e9lie (2001)"}
GOOD = "7\t1\t4\t880000000"
BROKEN = {
    "7\t1\t4": "wrong column count",
    "": "wrong column count",
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


@pytest.mark.parametrize(
    ("title", "clean"),
    [
        ("Toy Story (1995)", "Toy Story"),
        ("Matrix, The (1999)", "The Matrix"),
        ("Affair to Remember, An (1957)", "An Affair to Remember"),
        ("Chef in Love, A (1996)", "A Chef in Love"),
        ("Postino, Il (1994)", "Postino, Il"),
        ("Bye Bye, Love (1995)", "Bye Bye, Love"),
        ("Blue Angel, The (Blaue Engel, Der) (1930)", "The Blue Angel (Blaue Engel, Der)"),
        ("Die xue shuang xiong (Killer, The) (1989)", "Die xue shuang xiong (The Killer)"),
        ("Land Before Time III (1995) (V)", "Land Before Time III"),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey"),
        ("Seven (Se7en) (1995)", "Seven (Se7en)"),
        ("Ame\u0301lie (2001)", "Am\u00e9lie"),
        (" two\x00\x1b\n\u2028lines \u202ehere\u200b ", "two lines here"),
        ("unknown", "item 5"),
        ("(1995)", "item 5"),
        ("", "item 5"),
    ],
)
def test_clean_title(title: str, clean: str) -> None:
    assert clean_title(title, "5") == clean


@pytest.mark.parametrize("write", [write_grouplens, write_recbole])
def test_both_layouts_give_the_same_tables(tmp_path: Path, write: Write) -> None:
    data = read(write(tmp_path, [GOOD, "8\t3\t2.5\t0"], ITEMS), max_rejected_rows=0)
    assert data.items.to_numpy().tolist() == [
        ["1", "Toy Story"],
        ["2", "The Matrix"],
        ["3", "Am\u00e9lie"],
    ]
    assert data.interactions.to_numpy().tolist() == [
        ["7", "1", 4.0, 880000000],
        ["8", "3", 2.5, 0],
    ]
    assert (data.rejects, data.rows_read) == ([], 5)


def test_movielens_titles(movielens_items: Path, tmp_path: Path) -> None:
    (tmp_path / "u.item").write_bytes(movielens_items.read_bytes())
    (tmp_path / "u.data").write_text(f"{GOOD}\n")
    titles = read(tmp_path, max_rejected_rows=0).items["title"]
    assert (len(titles), titles.nunique()) == (1682, 1659)
    assert {"An Affair to Remember", "Mis\u00e9rables, Les", "item 267"} <= set(titles)


def test_movielens_has_the_same_titles_in_both_layouts(recbole: Path, grouplens: Path) -> None:
    data = read(grouplens, max_rejected_rows=0)
    other = read(recbole, max_rejected_rows=0)
    assert data.items.equals(other.items)
    assert data.interactions.equals(other.interactions)
    assert (len(data.items), len(data.interactions)) == (1682, 100_000)
    assert data.items["title"].nunique() == 1659
    u_data = hashlib.sha256((grouplens / "u.data").read_bytes()).hexdigest()
    assert u_data == "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([GOOD, *BROKEN]), max_size=30))
def test_every_line_is_used_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    lines = [*lines, GOOD]
    folder = write_grouplens(tmp_path_factory.mktemp("raw"), lines, ITEMS)
    data = read(folder, max_rejected_rows=len(lines))
    assert data.rejects == [
        Reject("u.data", number, BROKEN[line])
        for number, line in enumerate(lines, start=1)
        if line in BROKEN
    ]
    assert len(data.interactions) == lines.count(GOOD)
    assert data.rows_read == len(lines) + len(ITEMS)


def test_undecodable_line(tmp_path: Path) -> None:
    folder = write_recbole(tmp_path, [GOOD, GOOD], ITEMS)
    with (folder / "ml-100k.item").open("ab") as file:
        file.write(b"4\tAm\xe9lie\t2001\tDrama\r\n")
    data = read(folder, max_rejected_rows=1)
    assert data.rejects == [Reject("ml-100k.item", 5, "undecodable text")]


def test_too_many_rejects_name_count_reasons_place_and_way_out(tmp_path: Path) -> None:
    lines = [GOOD, "7\t1\t9\t1", "7\t1\t8\t1", "7\t9\t4\t1"]
    folder = write_grouplens(tmp_path, lines, ITEMS)
    with pytest.raises(DataError) as error:
        read(folder, max_rejected_rows=2)
    assert str(error.value) == (
        "3 of 7 rows rejected (2 bad rating, 1 unknown item); first: u.data:2 bad rating."
        " Allowed: 2. Raise data.max_rejected_rows to continue."
    )
    assert len(read(folder, max_rejected_rows=3).interactions) == 1


def test_an_item_with_two_titles_is_an_error(tmp_path: Path) -> None:
    folder = write_grouplens(tmp_path, [GOOD], ITEMS)
    same, other = "1|Toy Story (1995)" + "|" * 22 + "\n", "1|Heat (1995)" + "|" * 22 + "\n"
    with (folder / "u.item").open("a") as file:
        file.write(same)
    data = read(folder, max_rejected_rows=1)
    assert data.rejects == [Reject("u.item", 4, "repeated item")]
    with (folder / "u.item").open("a") as file:
        file.write(other)
    with pytest.raises(DataError, match="item 1 has two titles, 'Toy Story' and 'Heat'"):
        read(folder, max_rejected_rows=9)


def test_wrong_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"u\.data and u\.item or ml-100k\.inter and ml-100k"):
        raw_files(tmp_path)
    with pytest.raises(DataError, match=r"u\.data has no usable row"):
        read(write_grouplens(tmp_path / "empty", [], ITEMS), max_rejected_rows=0)
    folder = write_recbole(tmp_path / "header", [GOOD], ITEMS)
    (folder / "ml-100k.inter").write_text(f"{GOOD}\n")
    with pytest.raises(DataError, match="expected the header 'user_id:token"):
        read(folder, max_rejected_rows=9)
