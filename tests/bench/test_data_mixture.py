"""Plans of the largest size: built, found and gone on with in the time that they may take, in exact integers."""

import numpy as np
import pytest

from bench import _data_mixture
from tlite_jax.data.order import Plan


@pytest.mark.parametrize("scale", list(_data_mixture.SCALES))
def test_plans_of_any_size_are_quick(scale: str) -> None:
    (found,) = _data_mixture.measure(repeats=1, scales=(scale,)).values()
    # On a busy machine; bench/data.py prints what a quiet one needs.
    assert found["plan_seconds"] < 15
    assert found["first_batch_seconds"] < 5
    assert found["memory_bytes"] < 200e6


@pytest.fixture(scope="module")
def plan() -> Plan:
    """10T tokens in rows of 2048: 2 k l needs 66 bits."""
    tokens, length, _ = _data_mixture.SCALES["10T, rows of 2048"]
    return _data_mixture.build(tokens, length)


def test_positions_beyond_64_bits_are_exact(plan: Plan) -> None:
    assert plan.total_rows > 2**32
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(0, plan.total_rows, 60))
    bucket, epoch, _ = plan.locate(rows)
    for row, mine, passes in zip(rows.tolist(), bucket.tolist(), epoch.tolist(), strict=True):
        # Python's integers say how many rows of the bucket came before, and that this row is the next.
        before, after = plan.consumed(row), plan.consumed(row + 1)
        assert (after - before).nonzero()[0].tolist() == [mine]
        assert passes == before[mine] // plan.buckets[mine].rows


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 4, 8, 12])
def test_the_order_is_the_same_on_any_number_of_hosts(num_hosts: int, plan: Plan) -> None:
    start, size = 4_000_000_000, _data_mixture.BATCH_SIZE
    whole = np.stack(plan.locate(np.arange(start, start + 2 * size)))
    share = size // num_hosts
    batches = []
    for batch in range(2):
        first = start + batch * size
        hosts = [plan.locate(np.arange(first + h * share, first + (h + 1) * share)) for h in range(num_hosts)]
        batches.append(np.concatenate([np.stack(host) for host in hosts], axis=1))
    assert np.array_equal(np.concatenate(batches, axis=1), whole)


def test_2000_declared_buckets_are_shown() -> None:
    assert _data_mixture.measure_command(repeats=1) < 30
