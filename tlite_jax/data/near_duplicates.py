"""Documents that resemble an earlier one: MinHash signatures (datasketch) and banding, sorted band by band.

Two documents are compared when a band of their signatures agrees. Signatures and hashes of bands lie on disk, written
with the shards; the search sorts one band at a time and then takes the documents in order, so that its result depends
on nothing else. A document is removed when it resembles one that stays, never because of a chain of others.
"""

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlite_jax.config import NearDuplicatesConfig
from tlite_jax.data.permutation import mix64

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_WORD = re.compile(r"\w+")
_SEED, _PART = 1, 8192
# 32-bit permutations, named so that another version of datasketch computes the same ones.
_SCHEME = "affine32"
# A document is compared with this many kept ones of a band at most, the earliest: boilerplate agrees with thousands.
_MAX_COMPARED = 64
_NONE = np.uint32(2**32 - 1)


class Signer:
    """Text -> MinHash signature over its word n-grams, case and punctuation aside."""

    def __init__(self, config: NearDuplicatesConfig) -> None:
        import datasketch  # slow to import, and not always used

        self._ngram_words = config.ngram_words
        self._empty = datasketch.MinHash(num_perm=config.num_permutations, seed=_SEED, scheme=_SCHEME)
        self._bands, self._rows = banding(config)

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

    def bands(self, signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        """Hashes each band of signatures: uint32 [documents, num_permutations] -> uint64 [documents, bands]."""
        used = signatures[:, : self._bands * self._rows].astype(np.uint64).reshape(-1, self._bands, self._rows)
        hashes = np.zeros(used.shape[:2], np.uint64)
        for row in range(self._rows):
            hashes = mix64(hashes ^ used[:, :, row])
        return hashes


def banding(config: NearDuplicatesConfig) -> tuple[int, int]:
    """Returns how many bands of how many rows miss and mistake the fewest pairs at this threshold."""
    import datasketch

    index = datasketch.MinHashLSH(threshold=config.threshold, num_perm=config.num_permutations)
    return index.b, index.r


@dataclass(frozen=True)
class NearDuplicates:
    """Removed documents and for each the kept one it resembles most, with the estimated Jaccard similarity."""

    removed: Ints
    kept: Ints
    similarity: npt.NDArray[np.float64]


def near_duplicates(
    bands: Callable[[int], npt.NDArray[np.uint64]],
    signature: Callable[[int], npt.NDArray[np.uint32]],
    candidates: Bools,
    preferred: Bools,
    config: NearDuplicatesConfig,
    progress: Callable[[int, int], None] | None = None,
) -> NearDuplicates:
    """Finds documents that resemble an earlier kept one at least as much as the threshold.

    Takes about 30 bytes of memory a document, and 16 more for each band in which it agrees with another.

    Args:
      bands: band number -> uint64 [documents].
      signature: document number -> uint32 [num_permutations].
      candidates: bool [documents], those to look at.
      preferred: bool [documents], those that come before all others.
      config: threshold and signature size.
      progress: called with (documents compared, documents to compare).
    """
    documents = np.concatenate([np.flatnonzero(candidates & preferred), np.flatnonzero(candidates & ~preferred)])
    places, groups = _agreements(bands, documents, banding(config)[0])
    edges = _edges(places)
    kept = _KeptOfGroups(int(groups.max(initial=0)) + 1, places)
    removed, stays, similarities = array("q"), array("q"), array("d")
    for number in range(len(edges) - 1):
        start, end = int(edges[number]), int(edges[number + 1])
        mine = groups[start:end]
        others = documents[kept.find(mine)]
        document = int(documents[places[start]])
        similarity, other = _most_similar(signature, document, others)
        if similarity >= config.threshold:
            removed.append(document)
            stays.append(other)
            similarities.append(similarity)
        else:
            kept.insert(start, mine)
        if progress and (number % 1000 == 0 or number + 2 == len(edges)):
            progress(number + 1, len(edges) - 1)
    return NearDuplicates(np.array(removed, np.int64), np.array(stays, np.int64), np.array(similarities, np.float64))


def _agreements(
    bands: Callable[[int], npt.NDArray[np.uint64]], documents: Ints, num_bands: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Finds who agrees with another in a band.

    Returns:
      places: uint32 [agreements], places in `documents`, ascending.
      groups: uint32 [agreements], a number for each band and value of it.
    """
    all_places, all_groups, num_groups = [], [], 0
    for band in range(num_bands):
        values = bands(band)[documents]
        order = np.argsort(values, kind="stable")
        values = values[order]
        as_before = np.zeros(len(values) + 1, bool)
        as_before[1:-1] = values[1:] == values[:-1]
        shared = as_before[:-1] | as_before[1:]
        is_first = shared & ~as_before[:-1]
        all_places.append(order[shared].astype(np.uint32))
        all_groups.append((np.cumsum(is_first)[shared] - 1 + num_groups).astype(np.uint32))
        num_groups += int(is_first.sum())
    places, groups = np.concatenate(all_places), np.concatenate(all_groups)
    order = np.argsort(places, kind="stable")
    return places[order], groups[order]


def _edges(places: npt.NDArray[np.uint32]) -> Ints:
    """Where each new value begins in ascending ones, then their number."""
    begins = np.ones(len(places) + 1, bool)
    begins[1:-1] = places[1:] != places[:-1]
    return np.flatnonzero(begins) if len(places) else np.zeros(1, np.int64)


def _most_similar(signature: Callable[[int], npt.NDArray[np.uint32]], document: int, others: Ints) -> tuple[float, int]:
    if not others.size:
        return 0.0, -1
    agree = np.stack([signature(other) for other in others.tolist()]) == signature(document)
    similarities = agree.mean(axis=1)
    best = int(np.argmax(similarities))
    return float(similarities[best]), int(others[best])


class _KeptOfGroups:
    """For each group the places that stay, as chains through arrays: a list a group would take ten times as much."""

    def __init__(self, num_groups: int, places: npt.NDArray[np.uint32]) -> None:
        self._places = places
        self._first, self._last = np.full(num_groups, _NONE), np.full(num_groups, _NONE)
        self._next = np.full(len(places), _NONE)

    def find(self, groups: npt.NDArray[np.uint32]) -> Ints:
        """Returns the kept places of groups, each once, ascending."""
        found, agreements = [], self._first[groups]
        for _ in range(_MAX_COMPARED):
            agreements = agreements[agreements != _NONE]
            if not agreements.size:
                break
            found.append(agreements)
            agreements = self._next[agreements]
        return np.unique(self._places[np.concatenate(found)]).astype(np.int64) if found else np.empty(0, np.int64)

    def insert(self, start: int, groups: npt.NDArray[np.uint32]) -> None:
        """Adds agreements start..start+len(groups)-1, one to each group."""
        agreements = np.arange(start, start + len(groups), dtype=np.uint32)
        is_first = self._first[groups] == _NONE
        self._first[groups[is_first]] = agreements[is_first]
        self._next[self._last[groups[~is_first]]] = agreements[~is_first]
        self._last[groups] = agreements
