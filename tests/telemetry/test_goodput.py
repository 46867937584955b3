from pathlib import Path

import pytest

from tlite_jax.errors import UserError
from tlite_jax.telemetry.goodput import PARTS, Stopwatch, account, note_end, read_starts


class Clock:
    """A clock that is moved by hand; the calendar may be off by `skew`."""

    def __init__(self) -> None:
        self.now, self.skew = 100.0, 1.7e9

    def monotonic(self) -> float:
        return self.now

    def calendar(self) -> float:
        return self.now + self.skew


@pytest.fixture
def clock() -> Clock:
    return Clock()


def begin(path: Path | None, clock: Clock, step: int = 0, **spent: float) -> Stopwatch:
    return Stopwatch(path, step, {"jax": "0"}, spent=spent, clock=clock.monotonic, calendar=clock.calendar)


def train(stopwatch: Stopwatch, clock: Clock, first: int, last: int, seconds: float) -> None:
    for step in range(first, last):
        with stopwatch.section("step"):
            clock.now += seconds
        stopwatch.reached(step + 1)


def test_an_undisturbed_run_is_accounted_to_the_second(tmp_path: Path, clock: Clock) -> None:
    stopwatch = begin(tmp_path / "t", clock, init=4.0)
    with stopwatch.section("compile"):
        clock.now += 6
    train(stopwatch, clock, 0, 40, 2.0)
    with stopwatch.section("checkpoint"):
        clock.now += 5
    clock.now += 3
    stopwatch.close("done")
    stopwatch.close("again")
    result = account(read_starts(tmp_path / "t"))
    expected = dict.fromkeys(PARTS, 0.0) | {"init": 4, "compile": 6, "step": 80, "checkpoint": 5, "other": 3}
    assert result.parts == pytest.approx(expected)
    assert result.seconds == pytest.approx(98)
    assert result.goodput == pytest.approx(80 / 98)
    assert [start.status for start in result.starts] == ["done"]


def test_steps_done_again_are_lost_and_the_gap_is_a_wait(tmp_path: Path, clock: Clock) -> None:
    train(begin(tmp_path / "t", clock), clock, 0, 50, 2.0)  # killed: no end
    clock.now += 60
    stopwatch = begin(tmp_path / "t", clock, step=30, restore=1.0)
    train(stopwatch, clock, 30, 60, 2.0)
    stopwatch.close("done")
    result = account(read_starts(tmp_path / "t"))
    # Lines come every few seconds: the first start is known to have reached step 48.
    assert result.starts[0].last_step >= 47
    assert result.parts["lost"] == pytest.approx(2.0 * (result.starts[0].last_step - 30))
    assert result.parts["step"] == pytest.approx(2.0 * 60)
    assert result.parts["restore"] == 1.0
    assert result.seconds == pytest.approx(50 * 2 + 60 + 30 * 2, abs=1e-6)


def test_a_start_that_the_watchdog_ended_says_so_and_its_being_stuck_is_a_wait(tmp_path: Path, clock: Clock) -> None:
    train(begin(tmp_path / "t", clock), clock, 0, 51, 2.0)
    clock.now += 300  # stuck in its next step
    note_end(tmp_path / "t", "watchdog: process 1 is stuck")
    note_end(tmp_path / "t", "again")
    clock.now += 60
    stopwatch = begin(tmp_path / "t", clock, step=30, init=5.0)
    train(stopwatch, clock, 30, 60, 2.0)
    stopwatch.close("done")
    note_end(tmp_path / "t", "again")
    result = account(read_starts(tmp_path / "t"))
    assert [start.status for start in result.starts] == ["watchdog: process 1 is stuck", "done"]
    assert result.parts["lost"] == pytest.approx(2.0 * 21)
    assert result.parts["step"] == pytest.approx(2.0 * 60)
    assert result.parts["restart_wait"] == pytest.approx(300 + 60 - 5)
    assert result.parts["init"] == 5.0
    assert result.seconds == pytest.approx(51 * 2 + 300 + 60 + 30 * 2)


def test_where_there_is_no_account_no_end_is_noted(tmp_path: Path) -> None:
    note_end(tmp_path / "t", "watchdog")
    assert not list(tmp_path.iterdir())


def test_a_clock_set_back_makes_no_negative_wait(tmp_path: Path, clock: Clock) -> None:
    train(begin(tmp_path / "t", clock), clock, 0, 10, 1.0)
    clock.skew -= 3600
    stopwatch = begin(tmp_path / "t", clock, step=10)
    train(stopwatch, clock, 10, 20, 1.0)
    stopwatch.close("done")
    result = account(read_starts(tmp_path / "t"))
    assert result.parts["restart_wait"] == 0
    assert result.seconds <= 20


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "t"
    begin(path, clock).close("done")
    with path.open("ab") as file:
        file.write(b'{"event": "begin", "ti')
    assert len(read_starts(path)) == 1
    begin(path, clock, step=5).close("done")
    assert [start.first_step for start in read_starts(path)] == [0, 5]


def test_lines_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text('{"loss": 1}\n{"loss": 2}\n')
    with pytest.raises(UserError, match="t:1 is not a line of ours"):
        read_starts(tmp_path / "t")


def test_other_processes_write_nothing(tmp_path: Path, clock: Clock) -> None:
    stopwatch = begin(None, clock)
    train(stopwatch, clock, 0, 10, 10.0)
    stopwatch.close("done")
    assert not list(tmp_path.iterdir())
    assert read_starts(tmp_path / "absent") == ()
    assert account(()).seconds == 0
