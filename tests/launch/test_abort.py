"""Native code that calls abort(), as jax's does when another process is gone: status 76, a line and Python's stacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job.abort import Overheard
from launch.job.distributed import absent
from launch.job.world import World

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ABORTED = """
import ctypes, os, threading
from launch.job.abort import restart_on_abort

def waits_here():
    threading.Event().wait()

restart_on_abort(lambda: "not this one")
restart_on_abort(lambda: "process 2 is gone")
{abort}
waits_here()
"""
WORLD = World("n0:4000", 8, 3, 1, 0, "a test")
SAID = (
    "Barrier timed out.\n# of tasks that reached the barrier: {}/8.\nSome timed out task names:\n{}\n\nRPC: /Register"
)


@pytest.mark.parametrize("abort", ["threading.Timer(0.5, ctypes.CDLL(None).abort).start()", "os.abort()"])
def test_an_aborted_process_asks_for_a_restart(abort: str) -> None:
    words = [sys.executable, "-c", ABORTED.format(abort=abort)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY)
    assert ended.returncode == 76, ended.stderr
    assert ended.stderr.splitlines()[0] == "error: process 2 is gone"
    assert 'File "<string>", line' in ended.stderr
    assert ("in waits_here" in ended.stderr) == ("Timer" in abort)


def test_what_native_code_says_is_heard_and_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with Overheard() as overheard:
        os.write(2, b"task ")
        os.write(2, b"5\n")
        assert overheard.last_words() == "task 5\n"
        os.write(2, b"error: process 5\n")  # with nobody left to pass it on
    os.write(2, b"more\n")
    assert capfd.readouterr().err == "task 5\nerror: process 5\nmore\n"
    with Overheard() as overheard:
        os.write(2, b"all is well\n")
    assert capfd.readouterr().err == "all is well\n"


@pytest.mark.parametrize(
    ("said", "who"),
    [
        (SAID.format(7, "5"), "process 5 has not come"),
        (SAID.format(6, "5\n/job:jax_worker/replica:0/task:7"), "processes 5, 7 have not come"),
        ("DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /Register", "process 0 was not reached at n0:4000"),
    ],
)
def test_the_absent_are_named(said: str, who: str) -> None:
    assert absent(said, WORLD, 300) == f"{who} within 300 s (watchdog.join), start the job again"
