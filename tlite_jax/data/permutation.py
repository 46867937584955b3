"""A keyed permutation of 0..n-1 computed element by element: nothing is stored, any element costs the same.

A balanced Feistel network over the next even power of two, with cycle walking back into the range (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002). Four rounds correlate neighbours; eight do not.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

NUM_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(words: Words) -> Words:
    """Returns a bijective scramble of 64-bit words (the splitmix64 finaliser of Steele, Lea and Flood, 2014)."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permute(index: Ints, size: Ints, key: Words) -> Ints:
    """Returns where each index goes under the permutation of its own range that its key names.

    Args:
      index: int64 [N], each in 0..size-1.
      size: int64 [N], length of each range, at least 1.
      key: uint64 [N]; equal (size, key) means the same permutation.

    Returns:
      int64 [N], each in 0..size-1; for a fixed (size, key) the map from index is a bijection.
    """
    assert np.all((index >= 0) & (index < size)), "index out of its range"
    # frexp's exponent is the bit length (exact below 2**53; above, at most one bit more, which only walks longer).
    bits = np.frexp((size - 1).astype(np.float64))[1]
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    round_keys = [mix64(key)]
    while len(round_keys) < NUM_ROUNDS:
        round_keys.append(mix64(round_keys[-1] + key))
    result = index.astype(np.uint64)
    limit = size.astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        moved = _encrypt(result[walking], half[walking], [words[walking] for words in round_keys])
        result[walking] = moved
        walking = walking[moved >= limit[walking]]
    return result.astype(np.int64)


def _encrypt(words: Words, half: Words, round_keys: list[Words]) -> Words:
    """One pass of the network on words of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = words >> half, words & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix64(right ^ round_key) & mask)
    return (left << half) | right
