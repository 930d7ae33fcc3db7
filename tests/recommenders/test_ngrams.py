"""Titles as vectors of letters, against counts by hand."""

# Axes: I items, F title width.
from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from rsllm.recommenders.ngrams import title_ngrams, title_vectors

TITLES = ["Heat 2", "The heat", "Hat"]


def grams(title: str) -> Counter[str]:
    """Runs of three and four letters of each word between blanks; a short word is one run."""
    found: Counter[str] = Counter()
    for word in title.lower().split():
        padded = f" {word} "
        for size in (3, 4):
            found.update(padded[at : at + size] for at in range(max(1, len(padded) - size + 1)))
            if len(padded) <= size:
                break
    return found


def cosines(titles: list[str]) -> np.ndarray:
    """1 + log count, times 1 + log((1 + titles) / (1 + titles with the run)), then the angle."""
    counts = [grams(title) for title in titles]
    names = sorted(set().union(*counts))
    within = {name: sum(name in count for count in counts) for name in names}
    rarity = {name: 1 + math.log((1 + len(titles)) / (1 + within[name])) for name in names}
    rows = np.array(
        [[(1 + math.log(own[n])) * rarity[n] if own[n] else 0.0 for n in names] for own in counts]
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows @ rows.T)


@pytest.mark.parametrize(
    "titles", [TITLES, ["Heat", "heat"], ["abab abab ab", "ab"], ["Toy Set", "Toy Car", "Red Car"]]
)
def test_likeness_is_that_of_tf_idf_by_hand(titles: list[str]) -> None:
    ngrams_IG = title_ngrams(titles)
    found = (ngrams_IG @ ngrams_IG.T).toarray()
    np.testing.assert_allclose(found, cosines(titles), atol=1e-12)


def test_few_titles_keep_their_likeness_whole() -> None:
    """With no more titles than dimensions nothing is lost."""
    vectors_IF = title_vectors(TITLES, 256)
    assert vectors_IF.shape == (3, 3)
    assert vectors_IF.dtype == torch.float32
    np.testing.assert_allclose(vectors_IF @ vectors_IF.T, cosines(TITLES), atol=1e-5)
    assert torch.equal(title_vectors(TITLES, 256), vectors_IF), "it depends on nothing else"


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_one_title_and_equal_titles_have_vectors() -> None:
    assert title_vectors(["Heat"], 8).abs().tolist() == [[pytest.approx(1.0)]]
    equal_IF = title_vectors(["Heat", "Matrix", "heat", "Heat"], 8)
    np.testing.assert_allclose(equal_IF[2], equal_IF[0], atol=1e-6)
    np.testing.assert_allclose(equal_IF.norm(dim=1), 1.0, rtol=1e-5)
    assert abs(float(equal_IF[0] @ equal_IF[1])) < 1e-5


def test_many_titles_are_brought_into_few_dimensions() -> None:
    """As near to all likenesses at once as any so few dimensions come (Eckart and Young)."""
    words = ("Last", "Quiet", "Golden", "Broken", "Matrix", "Garden", "Voyage", "Letter")
    titles = [f"{a} {b}" for a in words for b in words if a != b]
    vectors_IF, exact_II = title_vectors(titles, 6), cosines(titles)
    assert vectors_IF.shape == (len(titles), 6)
    values, columns = np.linalg.eigh(exact_II)
    best_II = (columns[:, -6:] * values[-6:]) @ columns[:, -6:].T
    error, least = (
        np.linalg.norm(own - exact_II) for own in ((vectors_IF @ vectors_IF.T).numpy(), best_II)
    )
    assert error == pytest.approx(least, rel=0.05)
