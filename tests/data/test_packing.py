"""Best fit: every token once, rows as the plain algorithm makes them, full, and soon."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlite_jax.data.packing import Packing, best_fit


def placed_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """The room left in each row when the longest piece always goes into the fullest row that it fits."""
    pieces = [min(capacity, length - at) for length in lengths for at in range(0, length, capacity)]
    rooms: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= piece]
        if fitting:
            rooms[min(fitting, key=lambda row: rooms[row])] -= piece
        else:
            rooms.append(capacity - piece)
    return sorted(rooms)


@given(lengths=st.lists(st.integers(1, 70), max_size=60), capacity=st.integers(1, 40))
def test_it_is_best_fit_decreasing_and_loses_nothing(lengths: list[int], capacity: int) -> None:
    packing = best_fit(np.array(lengths, np.int64), capacity)
    used = np.bincount(packing.row, packing.length, minlength=packing.num_rows).astype(int)
    assert sorted(capacity - used) == placed_one_by_one(lengths, capacity)
    tokens = sorted(
        (document, offset + i)
        for document, offset, length in zip(packing.document, packing.offset, packing.length, strict=True)
        for i in range(length)
    )
    assert tokens == [(document, i) for document, length in enumerate(lengths) for i in range(length)]
    places = [
        (row, start + i)
        for row, start, length in zip(packing.row, packing.start, packing.length, strict=True)
        for i in range(length)
    ]
    assert len(set(places)) == len(places)
    assert all(0 <= place < capacity for _, place in places)
    assert np.all(np.diff(packing.row * (capacity + 1) + packing.start) > 0), "not in the order of rows and places"
    assert packing.split == sum(length > capacity for length in lengths)


def fill(packing: Packing, capacity: int) -> float:
    return packing.length.sum() / (packing.num_rows * capacity)


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_a_million_instructions_are_packed_soon_and_fully(capacity: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.6, 1.0, 1_000_000), 8, 40_000).astype(np.int64)
    began = time.monotonic()
    packing = best_fit(lengths, capacity)
    assert time.monotonic() - began < 20, "took about 1 s on a quiet core"
    assert fill(packing, capacity) > 0.999
    assert packing.length.sum() == lengths.sum()


def test_the_same_input_gives_the_same_rows() -> None:
    lengths = np.random.default_rng(1).integers(1, 3000, 5000)
    one, other = best_fit(lengths, 1024), best_fit(lengths.copy(), 1024)
    assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_there_may_be_nothing() -> None:
    packing = best_fit(np.empty(0, np.int64), 8)
    assert (packing.num_rows, len(packing.row)) == (0, 0)
