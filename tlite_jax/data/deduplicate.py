"""Duplicates: exact ones by hash, near ones by MinHash signatures and locality-sensitive hashing (datasketch).

Both keep the document that comes first in the order they are given.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tlite_jax.config import NearDuplicatesConfig

Ints = npt.NDArray[np.int64]

_WORD = re.compile(r"\w+")
_SEED, _PART = 1, 8192
# 32-bit permutations, named so that another version of datasketch computes the same ones.
_SCHEME = "affine32"


class Signer:
    """Text -> MinHash signature over its word n-grams, case and punctuation aside."""

    def __init__(self, config: NearDuplicatesConfig) -> None:
        import datasketch  # slow to import, and not always used

        self._ngram_words = config.ngram_words
        self._empty = datasketch.MinHash(num_perm=config.num_permutations, seed=_SEED, scheme=_SCHEME)

    def sign(self, text: str) -> npt.NDArray[np.uint32]:
        """Returns uint32 [num_permutations]; the share of equal entries of two estimates their Jaccard similarity."""
        words = _WORD.findall(text.lower()) or list(text)
        ngrams = {" ".join(words[i : i + self._ngram_words]) for i in range(max(1, len(words) - self._ngram_words + 1))}
        signature = self._empty.copy()
        # In parts: hashing n-grams takes num_permutations words of memory for each.
        encoded = [ngram.encode() for ngram in ngrams]
        for start in range(0, len(encoded), _PART):
            signature.update_batch(encoded[start : start + _PART])
        return signature.hashvalues.astype(np.uint32)


def exact_duplicates(hashes: npt.NDArray[np.uint64], order: Ints) -> Ints:
    """Finds, for every document, the one that stays in its place.

    Args:
      hashes: uint64 [documents, 2].
      order: int64 [documents], the documents' numbers, those to prefer first.

    Returns:
      int64 [documents]: the number of the kept document with the same hash, its own number where it is kept itself.
    """
    count = len(hashes)
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    by_hash = np.lexsort((rank, hashes[:, 0], hashes[:, 1]))
    ordered = hashes[by_hash]
    is_first = np.ones(count, bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(is_first, np.arange(count), 0))
    kept = np.empty(count, np.int64)
    kept[by_hash] = by_hash[first]
    return kept


def near_duplicates(
    signatures: Callable[[int], npt.NDArray[np.uint32]],
    candidates: Sequence[int] | Ints,
    config: NearDuplicatesConfig,
    progress: Callable[[int], None] | None = None,
) -> dict[int, tuple[int, float]]:
    """Finds documents that resemble an earlier kept one at least as much as the threshold.

    The index of kept documents lies in memory, about 5 KB a document at 128 permutations.

    Args:
      signatures: document number -> uint32 [num_permutations].
      candidates: document numbers, those to prefer first.
      config: threshold and signature size.
      progress: called with the number of documents compared.

    Returns:
      removed document -> (the kept one it resembles most, estimated Jaccard similarity).
    """
    import datasketch

    index = datasketch.MinHashLSH(threshold=config.threshold, num_perm=config.num_permutations)
    removed: dict[int, tuple[int, float]] = {}
    for number, document in enumerate(candidates):
        values = signatures(int(document))
        signature = datasketch.LeanMinHash(seed=_SEED, hashvalues=values, scheme=_SCHEME)
        similar = [(float(np.mean(signatures(other) == values)), -other) for other in index.query(signature)]
        similarity, kept = max(similar, default=(0.0, 0))
        if similarity >= config.threshold:
            removed[int(document)] = (-kept, similarity)
        else:
            index.insert(int(document), signature, check_duplication=False)
        if progress:
            progress(number + 1)
    return removed
