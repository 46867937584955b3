"""How long threads wait for a CPU, as the system counts it; and the work by which accelerators are compared."""

import threading
import time
from pathlib import Path

import pytest

from launch.job import delays
from launch.job.delays import Ran, ThreadDelay, busiest, threads
from launch.job.unit_of_work import UnitOfWork

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux counts it")


def test_the_busiest_thread_is_the_one_that_wanted_a_cpu_for_longest() -> None:
    before = {1: Ran(10.0, 5.0), 2: Ran(0.0, 0.0)}
    after = {1: Ran(11.0, 5.5), 2: Ran(0.5, 4.0), 3: Ran(1.0, 0.0)}  # 3 has begun since
    assert busiest(before, after) == Ran(0.5, 4.0)
    assert busiest(after, {1: Ran(11.0, 5.5)}) == busiest({}, {}) == Ran(0.0, 0.0)


@linux
def test_a_thread_that_computes_is_seen_and_one_that_sleeps_waits_for_no_cpu() -> None:
    before, end = threads(), time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    mine = threading.get_native_id()
    assert 0.05 <= threads()[mine].running - before[mine].running < 1.0
    delay = ThreadDelay()
    assert delay.seconds() == pytest.approx(threads()[mine].delayed, abs=0.5)
    asleep = delay.seconds()
    time.sleep(0.2)
    assert delay.seconds() - asleep < 0.2


def test_where_the_system_does_not_count_nobody_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(delays, "_THREADS", tmp_path)
    assert ThreadDelay().seconds() == 0.0
    assert threads() == {}


def test_a_unit_of_work_takes_time_in_proportion() -> None:
    short, long = UnitOfWork(width=64, products=8), UnitOfWork(width=64, products=800)
    assert 0 < min(short.seconds() for _ in range(5)) < min(long.seconds() for _ in range(5))
