"""Limits, and what is done when one is passed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tlite_jax.config import WatchdogConfig
from tlite_jax.telemetry.watchdog import Limits, Watchdog

CONFIG = WatchdogConfig(step_floor=10.0, step_factor=3.0, compile=500.0, checkpoint=200.0)


class Clock:
    """Time that passes when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Board:
    """One that holds what it is told."""

    text: str | None = None

    def alarm(self) -> str | None:
        return self.text

    def raise_alarm(self, text: str) -> None:
        self.text = text


def test_a_step_is_judged_by_recent_ones_once_there_are_enough() -> None:
    limits = Limits(CONFIG)
    for seconds in [400.0] * 3 + [6.0] * 8:
        assert limits.of("step") == limits.of("data_wait") == 500.0
        limits.stepped(seconds)
    assert limits.of("step") == limits.of("data_wait") == 18.0
    for _ in range(500):
        limits.stepped(1.0)
    assert limits.of("step") == 10.0
    assert limits.of("evaluation") == CONFIG.evaluation


def test_steps_after_a_long_section_wait_for_processes_that_are_still_at_it() -> None:
    limits = Limits(CONFIG)
    for _ in range(20):
        limits.stepped(1.0)
    limits.entered("checkpoint")
    assert limits.of("step") == 200.0
    for _ in range(3):
        assert limits.of("step") == 200.0
        limits.stepped(150.0)
    assert limits.of("step") == 10.0  # and those steps say nothing of the pace


def test_it_looks_at_the_section_entered_last_and_at_the_board(tmp_path: Path) -> None:
    clock, board = Clock(), Board()
    watchdog = Watchdog(CONFIG, tmp_path / "stacks", 3, board, clock=clock)
    watchdog.enter("checkpoint")
    clock.now += 200.0
    assert watchdog.look() is None
    clock.now += 0.5
    found = watchdog.look()
    assert found is not None
    assert found.startswith("process 3 (")
    assert found.endswith("has been in checkpoint for 200.5 s, of at most 200.0")
    watchdog.enter("other")
    assert watchdog.look() is None
    board.text = "process 1 is stuck"
    assert watchdog.look() == "process 1 is stuck"


def test_a_board_that_fails_stops_nothing(tmp_path: Path) -> None:
    class Gone(Board):
        def alarm(self) -> str | None:
            raise RuntimeError("UNAVAILABLE")

    assert Watchdog(CONFIG, tmp_path / "stacks", 0, Gone()).look() is None


def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    watchdog = Watchdog(WatchdogConfig(enabled=False), tmp_path / "stacks").start()
    watchdog.close()
    assert not list(tmp_path.iterdir())


STUCK = """
import sys, threading
from pathlib import Path
from tlite_jax.config import WatchdogConfig
from tlite_jax.telemetry import watchdog

def stuck_here():
    threading.Event().wait()

watchdog.Watchdog(WatchdogConfig(checkpoint=0.2), Path(sys.argv[1])).start().enter("checkpoint")
stuck_here()
"""
# Native code that keeps Python's lock: the thread never runs again, and the system's timer ends the process.
HELD = """
import ctypes, sys
from pathlib import Path
from tlite_jax.config import WatchdogConfig
from tlite_jax.telemetry import watchdog

watchdog.POLL_SECONDS, watchdog._BACKSTOP_SECONDS = 0.1, 0.3
dog = watchdog.Watchdog(WatchdogConfig(init=0.5), Path(sys.argv[1])).start()
dog._closed.wait(0.3)
ctypes.PyDLL(None).sleep(60)
ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.parametrize(("program", "status"), [(STUCK, 76), (HELD, -signal.SIGALRM)])
def test_a_real_process_ends_with_its_stacks(tmp_path: Path, program: str, status: int) -> None:
    stacks = tmp_path / "watchdog" / "rank-0.log"
    words = [sys.executable, "-c", program, str(stacks)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == status, ended.stderr
    assert 'File "<string>"' in ended.stderr
    if status == 76:
        assert "in stuck_here" in stacks.read_text()
        assert "process 0 (" in ended.stderr
        assert "has been in checkpoint for" in ended.stderr
