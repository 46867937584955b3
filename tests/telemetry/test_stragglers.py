"""Which process is slow, from what all of them measured."""

import itertools

import numpy as np
import pytest

from tlite_jax.telemetry.stragglers import WINDOW, Finding, Judge, Pace

HEALTHY = Pace("n0", 0.01, 0.02, device=2.0, unit=0.010, on_cpu=False, stalled=0.0, running=0.3, delayed=0.0)


def job(size: int, changed: dict[int, Pace], noise: float = 0.0, seed: int = 0) -> dict[int, Pace]:
    """An interval; each number is off by some noise, as it is on real machines."""
    chance = np.random.default_rng(seed)
    paces = {}
    for number in range(size):
        pace = changed.get(number, HEALTHY)._replace(host=f"n{number}")
        numbers = {
            field: getattr(pace, field) * float(np.exp(noise * chance.normal()))
            for field in ("data_wait", "other", "device", "unit", "running")
        }
        paces[number] = pace._replace(**numbers)
    return paces


def judged(size: int, changed: dict[int, Pace], *, intervals: int = WINDOW, noise: float = 0.0) -> list[Finding]:
    judge = Judge(1.2)
    return [found for seed in range(intervals) for found in judge.add(job(size, changed, noise, seed))]


@pytest.mark.parametrize("size", [2, 3, 96])
def test_one_that_waits_for_data_is_named_with_its_part(size: int) -> None:
    # It starts its steps late, and the devices of all are done soon after.
    late = HEALTHY._replace(data_wait=2.24, other=0.56)
    (found,) = judged(size, {1: late})
    assert (found.process, found.host, found.slow) == (1, "n1", True)
    assert found.ratio == pytest.approx(2.8 / 2.0)
    assert found.text() == (
        "process 1 (n1) is 1.4 times slower than the median of the others: "
        "data wait 80%, the rest of its host's work 20%"
    )


def test_waiting_that_the_devices_hide_is_no_matter() -> None:
    assert not judged(3, {1: HEALTHY._replace(data_wait=1.9)})


def test_one_with_slow_devices_is_named_although_all_steps_take_as_long() -> None:
    paces = dict.fromkeys(range(4), HEALTHY._replace(device=2.6)) | {2: HEALTHY._replace(device=2.6, unit=0.013)}
    (found,) = judged(4, paces)
    assert found.process == 2
    assert found.ratio == pytest.approx(1.3)
    assert "its devices take 1.3 times as long for the same work" in found.text()


def test_two_slow_ones_are_both_named() -> None:
    found = judged(8, dict.fromkeys((3, 6), HEALTHY._replace(data_wait=4.0)))
    assert sorted(one.process for one in found) == [3, 6]


def test_noise_alone_names_nobody_and_a_slow_one_is_found_in_it() -> None:
    assert not judged(16, {}, intervals=200, noise=0.1)
    (found,) = judged(16, {5: HEALTHY._replace(unit=0.02)}, intervals=200, noise=0.1)
    assert found.process == 5


def test_a_single_slow_interval_names_nobody() -> None:
    judge = Judge(1.2)
    slow = {1: HEALTHY._replace(data_wait=30.0)}
    assert not [found for number in range(20) for found in judge.add(job(4, slow if number == 10 else {}))]


def test_it_is_told_once_and_once_more_when_it_is_over() -> None:
    judge = Judge(1.2)
    slow = {1: HEALTHY._replace(data_wait=3.0)}
    told = [judge.add(job(4, slow)) for _ in range(20)]
    assert [len(found) for found in told] == [0, 0, 0, 1] + [0] * 16
    assert judge.slowest == (1, pytest.approx(3.02 / 2.0))
    after = list(itertools.chain.from_iterable(judge.add(job(4, {})) for _ in range(20)))
    assert [found.text() for found in after] == ["process 1 (n1) keeps up with the others again"]


def test_one_that_stands_still_says_so() -> None:
    (found,) = judged(3, {0: HEALTHY._replace(unit=0.02, stalled=0.5)})
    assert "it stood still 50% of the time" in found.text()


def test_one_that_is_slow_now_and_then_is_not_named() -> None:
    late, judge = {1: HEALTHY._replace(data_wait=3.0)}, Judge(1.2)
    turns = 4 * [False, True, False, True, True]  # more often than not, but not most of the time
    assert [found for is_late in turns for found in judge.add(job(4, late if is_late else {}))] == []


def test_where_all_differ_a_process_must_differ_more() -> None:
    """From interval to interval as from process to process."""
    spread = [1.0, 1.4, 0.7, 1.2, 0.8, 1.3, 0.75, 1.15]
    uneven = {number: HEALTHY._replace(data_wait=2.0 * ratio + 1.0) for number, ratio in enumerate(spread)}
    assert not judged(8, uneven)
    even = dict.fromkeys(range(8), HEALTHY._replace(data_wait=3.0)) | {1: uneven[1]}
    assert [found.process for found in judged(8, even)] == [1]


def test_one_that_is_told_to_keep_up_again_is_well_below_the_limit() -> None:
    judge = Judge(1.2)

    def intervals(data_wait: float) -> list[bool]:
        paces = job(4, {1: HEALTHY._replace(data_wait=data_wait, other=0.0)})
        return [found.slow for _ in range(2 * WINDOW) for found in judge.add(paces)]

    assert intervals(2.6) == [True]  # 1.3 times the others'
    assert intervals(2.3) == []  # 1.15: it would be told again and again
    assert intervals(2.1) == [False]


ON_CPU = HEALTHY._replace(on_cpu=True, unit=0.0)


def test_a_process_whose_cpu_is_taken_away_is_found() -> None:
    throttled = ON_CPU._replace(running=0.09, delayed=0.9)
    (found,) = judged(3, dict.fromkeys(range(3), ON_CPU) | {2: throttled})
    assert (found.process, found.ratio) == (2, pytest.approx(10))
    assert "it waits for a CPU 90% of the time" in found.text()
    assert not judged(3, {2: throttled._replace(on_cpu=False)})  # its accelerators do not wait with it


def test_where_cpus_are_short_for_all_those_that_wait_for_others_differ_and_are_not_named() -> None:
    """As measured: two threads that look again and again whether the third process has come, and that process."""
    short = [(0.35, 0.55), (0.33, 0.52), (0.05, 0.36)]
    even = {number: ON_CPU._replace(running=ran, delayed=delayed) for number, (ran, delayed) in enumerate(short)}
    assert not judged(3, even)
    assert not judged(2, {0: even[0], 1: even[2]})
    (found,) = judged(3, even | {2: ON_CPU._replace(running=0.02, delayed=0.95)})
    assert found.process == 2


def test_a_process_that_stands_still_half_of_the_time_has_slow_cpus_and_not_slow_accelerators() -> None:
    assert not judged(3, {2: HEALTHY._replace(stalled=0.5)})
    (found,) = judged(3, dict.fromkeys(range(3), ON_CPU) | {2: ON_CPU._replace(stalled=0.5)})
    assert (found.process, found.ratio) == (2, pytest.approx(2))


def test_one_whose_devices_could_not_be_measured_is_not_named() -> None:
    assert not judged(3, {1: HEALTHY._replace(unit=0.0)})
