import io
import math
import os
import pty
import subprocess
import sys

import pytest

from tlite_jax.telemetry.console import ConsoleSink, _count, _duration
from tlite_jax.telemetry.metrics import MetricsWriter

STEP = {"loss": 2.34567, "gradient_norm": 1.5, "learning_rate": 1e-5, "tokens_per_second": 288123.0, "mfu": 0.587}
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    return Terminal()


def test_plain_lines_where_there_is_no_terminal(capsys):
    clock = Clock()
    with MetricsWriter([ConsoleSink(14305, 0, "stage 1", clock=clock)]) as writer:
        writer.write(1, STEP)
        clock.seconds = 10 * 21.8
        writer.write(11, STEP | {"loss": 12.3, "learning_rate": 0.0, "tokens_per_second": 950.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step     1/14305  loss  2.3457  norm   1.50  lr 1.00e-05   288k tok/s  mfu 58.7%"
    assert second.startswith("step    11/14305  loss 12.3000  norm   1.50  lr 0.00e+00    950 tok/s  mfu 58.7%")
    assert second.endswith("eta 3d 14:33")
    assert first.index("tok/s") == second.index("tok/s")


def test_metrics_that_are_missing_are_left_out(capsys):
    sink = ConsoleSink(10)
    sink.write(1, {"loss": math.nan})
    sink.close()
    sink.close()
    assert capsys.readouterr().out == "step  1/10  loss     nan\n"


def test_an_evaluation_is_a_line_of_its_own(capsys):
    sink = ConsoleSink(300)
    sink.write(20, {"bits_per_byte/ru": 1.17, "bits_per_byte/en": 0.9712345})
    assert capsys.readouterr().out == "step  20/300  bits_per_byte/ru 1.1700  bits_per_byte/en 0.9712\n"


def test_time_left_is_that_of_recent_steps_of_this_try(capsys):
    clock = Clock()
    sink = ConsoleSink(200, start_step=100, clock=clock)
    clock.seconds = 500.0  # compilation
    for step in range(101, 151):
        clock.seconds += 2 if step < 120 else 4
        sink.write(step, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines()[-1].endswith("eta 0:03:20")


def test_a_live_bar_on_a_terminal(terminal):
    clock = Clock()
    with MetricsWriter([ConsoleSink(30, 10, "adapting [ru]", stream=terminal, clock=clock)]) as writer:
        writer.write(11, STEP)
        clock.seconds = 60.0
        writer.write(12, STEP)
        writer.write(12, {"bits_per_byte/ru": 1.17})
    shown = terminal.getvalue()
    last = shown.split("\r")[-1]
    for part in ("adapting [ru]", "12/30", "loss  2.3457", "lr 1.00e-05", "288k tok/s", "eta 0:18:00"):
        assert part in last, (part, last)
    assert "step 12/30  bits_per_byte/ru 1.1700" in shown
    assert shown.index(HIDE_CURSOR) < shown.rindex(SHOW_CURSOR)


def test_a_terminal_of_80_columns_is_enough(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    sink = ConsoleSink(14305, stream=terminal, clock=Clock())
    for step in (1, 2):
        sink.write(step, STEP)
    sink.close()
    last = terminal.getvalue().split("\r")[-1]
    for part in ("train", "2/14305", "loss  2.3457", "lr 1.00e-05", "288k tok/s", "eta 0:00:00"):
        assert part in last, (part, last)


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    ConsoleSink(10, stream=terminal).write(1, {"loss": 1.0})
    assert terminal.getvalue() == "step  1/10  loss  1.0000\n"


INTERRUPTED = """
import os, signal, sys
from tlite_jax.telemetry.console import ConsoleSink
sink = ConsoleSink(10)
sink.write(1, {"loss": 1.0})
if sys.argv[1] == "closed":
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        sink.close()
        print("after")
else:  # nobody closes it
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("closed", ["closed", "forgotten"])
def test_control_c_gets_through_and_the_terminal_is_restored(closed):
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", INTERRUPTED, closed]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
    os.close(ours)
    _, errors = process.communicate()
    assert errors.decode().rstrip().endswith("KeyboardInterrupt")
    assert process.returncode != 0
    text = shown.decode()
    assert "1/10" in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert text.rstrip().endswith("after") == (closed == "closed")


def test_counts_and_durations_are_short():
    assert [_count(value) for value in (0, 7.2, 999.4, 999.6, 9_990, 99_960, 999_600, 1.2e7)] == [
        "0",
        "7",
        "999",
        "1.00k",
        "9.99k",
        "100k",
        "1.00M",
        "12.0M",
    ]
    assert [_duration(value) for value in (0, 59.6, 86399, 86400)] == ["0:00:00", "0:01:00", "23:59:59", "1d 00:00"]
