"""Titles as vectors of the letters they are written with: no language model, no training."""

# Axes: I items, G distinct n-grams, F title width.

from collections.abc import Sequence

import torch
from scipy.sparse import csr_matrix
from torch import Tensor


def title_ngrams(titles: Sequence[str]) -> csr_matrix:
    """How often each title has each run of three or four characters of a word, as TF-IDF. [I, G].

    Rows have unit length, so products of rows say how alike two titles are.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    ngrams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    return csr_matrix(ngrams.fit_transform(titles))


def title_vectors(titles: Sequence[str], width: int) -> Tensor:
    """The same in few dimensions: latent semantic analysis (Deerwester et al. 1990). [I, F].

    F is `width`, or less where there are fewer titles or n-grams.
    """
    from sklearn.decomposition import TruncatedSVD

    ngrams_IG = title_ngrams(titles)
    size = min(width, *ngrams_IG.shape)
    return torch.from_numpy(TruncatedSVD(size, random_state=0).fit_transform(ngrams_IG)).float()
