"""Documents with equal text, found by sorting their hashes."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def exact_duplicates(hashes: npt.NDArray[np.uint64], preferred: Bools) -> Ints:
    """Finds, for every document, the one that stays in its place: a preferred one before others, then the first.

    Takes about 40 bytes of memory a document at its peak, the hashes not counted.

    Args:
      hashes: uint64 [documents, 2].
      preferred: bool [documents].

    Returns:
      int64 [documents]: the number of the kept document with the same hash, its own number where it is kept itself.
    """
    count = len(hashes)
    kept = np.arange(count)
    candidates = _share_a_value(np.ascontiguousarray(hashes[:, 0]))
    values = hashes[candidates]
    # Equal hashes together, in each group the one to keep first.
    order = np.lexsort((candidates, ~preferred[candidates], values[:, 1], values[:, 0]))
    candidates, values = candidates[order], values[order]
    is_first = np.ones(len(candidates), bool)
    is_first[1:] = (values[1:] != values[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(candidates)), 0))
    kept[candidates] = candidates[first]
    return kept


def _share_a_value(values: npt.NDArray[np.uint64]) -> Ints:
    """The places whose value occurs elsewhere too, in no particular order."""
    order = np.argsort(values)
    ordered = values[order]
    shared = np.zeros(len(values), bool)
    np.equal(ordered[1:], ordered[:-1], out=shared[1:])
    shared[:-1] |= shared[1:]
    return order[shared]
