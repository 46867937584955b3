"""The simulation against the first-order estimate, and against cases that have an exact answer."""

from dataclasses import replace

import pytest

from bench.goodput import Assumptions, best_interval, estimate, simulate


@pytest.mark.parametrize(("gpus", "least"), [(96, 0.99), (1024, 0.97)])
def test_it_agrees_with_the_estimate_where_failures_are_rare(gpus: int, least: float) -> None:
    assumed = Assumptions(gpus)
    found = simulate(assumed, seed=1, days=30_000.0)
    assert found == pytest.approx(estimate(assumed), abs=1e-3)
    assert found > least


def test_without_failures_only_blocking_is_lost() -> None:
    assumed = replace(Assumptions(96), days_between_failures_at_96=1e7, interval=98.0, blocking=2.0)
    assert simulate(assumed, seed=1, days=1e6) == pytest.approx(0.98, abs=1e-4)


def test_youngs_interval_is_better_than_its_half_and_its_double() -> None:
    base = replace(Assumptions(1024), blocking=30.0)
    best = best_interval(base)
    low, found, high = (simulate(replace(base, interval=best * share), 1, 30_000.0) for share in (0.4, 1.0, 2.5))
    assert found > max(low, high)


def test_a_seed_repeats() -> None:
    assert simulate(Assumptions(96), 3, 1000.0) == simulate(Assumptions(96), 3, 1000.0)
