"""The benchmark of the data engine runs, at a size that says nothing of speed."""

import os

from bench import _data_loader


def test_the_loader_is_measured_on_one_core_that_is_given_back() -> None:
    before = os.sched_getaffinity(0)
    found = _data_loader.measure(tokens=1_500_000, repeats=1)
    assert os.sched_getaffinity(0) == before
    assert len(found) == 4
    for rates in found.values():
        assert rates["wall_mtok_per_second"] > 0
        assert 0 < rates["share_of_a_core"] < 0.05
