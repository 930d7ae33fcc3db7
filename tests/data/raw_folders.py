"""Writers of small raw folders, in both layouts."""

from __future__ import annotations

from pathlib import Path

INTER_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"


def write_grouplens(folder: Path, interactions: list[str], items: dict[str, str]) -> Path:
    """Write `u.data` (tab-separated lines as given) and `u.item` (latin-1)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{item}|{title}" + "|" * 22 for item, title in items.items()]
    _write_lines(folder / "u.data", interactions, "utf-8")
    _write_lines(folder / "u.item", rows, "latin-1")
    return folder


def write_recbole(folder: Path, interactions: list[str], items: dict[str, str]) -> Path:
    """Write the same as RecBole's atomic files (UTF-8, with headers)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{item}\t{title}\t1995\tDrama" for item, title in items.items()]
    _write_lines(folder / "ml-100k.inter", [INTER_HEADER, *interactions], "utf-8")
    _write_lines(folder / "ml-100k.item", [ITEM_HEADER, *rows], "utf-8")
    return folder


def _write_lines(path: Path, lines: list[str], encoding: str) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
