"""Titles as prompts show them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsllm.data.titles import clean_title


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


@given(st.text())
def test_a_clean_title_is_one_printable_line(title: str) -> None:
    clean = clean_title(title, "5")
    assert clean
    assert clean == clean.strip()
    assert len(clean.splitlines()) == 1
    assert not any(char in clean for char in "\x00\x1b\u200b\u202e\ufeff")
