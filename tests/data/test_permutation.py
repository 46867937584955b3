"""The permutation is a bijection of its own range, and looks random."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlite_jax.data.permutation import permute


def _whole(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_is_a_bijection(size: int, key: int) -> None:
    assert sorted(_whole(size, key)) == list(range(size))


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.floats(0, 1)), min_size=1, max_size=50))
def test_elements_of_different_permutations_do_not_interact(items: list[tuple[int, int, float]]) -> None:
    size = np.array([size for size, _, _ in items])
    key = np.array([key for _, key, _ in items], np.uint64)
    index = np.array([min(size - 1, int(size * place)) for size, _, place in items])
    together = permute(index, size, key)
    alone = [permute(index[i : i + 1], size[i : i + 1], key[i : i + 1])[0] for i in range(len(items))]
    assert together.tolist() == alone
    assert np.all((together >= 0) & (together < size))


@pytest.mark.parametrize("size", [1000, 65_536, 1_000_000])
def test_neighbours_are_not_correlated(size: int) -> None:
    values = _whole(size, 12345).astype(float)
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 4 / np.sqrt(size)


def test_another_key_is_another_permutation() -> None:
    first, second = _whole(10_000, 1), _whole(10_000, 2)
    assert np.mean(first == second) < 0.002
    # Every place is as likely as any other for the first element.
    size = 10
    firsts = permute(np.zeros(20_000, np.int64), np.full(20_000, size), np.arange(20_000, dtype=np.uint64))
    assert np.bincount(firsts, minlength=size) == pytest.approx(np.full(size, 2000), rel=0.1)
