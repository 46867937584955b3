"""Held-out documents depend on their content and the seed only."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tlite_jax.config import HeldOutConfig
from tlite_jax.data.splits import held_out


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), np.uint64)


@given(st.integers(0, 300), st.floats(0, 0.99), st.integers(0, 2**70), st.integers(0, 300))
def test_documents_added_later_move_nothing(count: int, fraction: float, seed: int, more: int) -> None:
    both = hashes(count + more)
    config = HeldOutConfig(fraction=fraction, seed=seed)
    few, many = held_out(both[:count], config), held_out(both, config)
    # Only the two rules of least numbers, one held out and one not, may differ.
    assert np.sum(few != many[:count]) <= 2


def test_the_share_is_the_fraction() -> None:
    chosen = held_out(hashes(100_000), HeldOutConfig(fraction=0.02))
    assert abs(chosen.mean() - 0.02) < 0.002
    assert not held_out(hashes(1000), HeldOutConfig(fraction=0.0)).any()


def test_order_does_not_matter_and_seed_does() -> None:
    values, config = hashes(1000), HeldOutConfig(fraction=0.1)
    order = np.random.default_rng(1).permutation(1000)
    assert np.array_equal(held_out(values, config)[order], held_out(values[order], config))
    other = held_out(values, HeldOutConfig(fraction=0.1, seed=1))
    assert not np.array_equal(held_out(values, config), other)


def test_small_buckets_have_both_kinds_and_the_limit_holds() -> None:
    for count in range(2, 30):
        assert 0 < held_out(hashes(count, count), HeldOutConfig(fraction=0.01)).sum() < count
        assert 0 < held_out(hashes(count, count), HeldOutConfig(fraction=0.99)).sum() < count
    assert (
        not held_out(hashes(1), HeldOutConfig(fraction=0.9)).any()
        or held_out(hashes(1), HeldOutConfig(fraction=0.9)).all()
    )
    limited = held_out(hashes(1000), HeldOutConfig(fraction=0.5, max_documents=7))
    assert limited.sum() == 7
    assert not np.any(limited & ~held_out(hashes(1000), HeldOutConfig(fraction=0.5)))
    assert not held_out(hashes(9), HeldOutConfig(fraction=0.5, max_documents=0)).any()
