"""The sink of trackers: what is written arrives, and a tracker that fails, hangs or ends stops nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tlite_jax.telemetry.trackers import process, sink
from tlite_jax.telemetry.trackers.sink import TrackerSink

# A tracker that adds what it is told to a file; words of the command line spoil it.
_TRACKER = """
import json, os, signal, sys, time
from tlite_jax.telemetry.trackers.process import RefusedError, serve

class Tracker:
    url = None
    def __init__(self, settings):
        self.note({"open": settings, "pid": os.getpid()})
        if "hang-open" in words:
            time.sleep(3600)
        if "no-key" in words:
            raise ValueError("no key for https://me:hidden@host\\nand more")
    def note(self, what):
        with open(path, "a") as file:
            file.write(json.dumps(what) + "\\n")
    def log(self, points):
        if "refuse-1" in words and points[0][0] == 1:
            raise RefusedError("step 1 is bad")
        if "hang" in words:
            time.sleep(3600)
        if "die-once" in words and not os.path.exists(path + ".died"):
            open(path + ".died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        self.note({"log": points})
    def close(self, finished):
        self.note({"close": finished})
        if "hang-close" in words:
            time.sleep(3600)

path, *words = sys.argv[1:]
def write(answer):
    sys.stdout.write(answer)
    sys.stdout.flush()
serve(Tracker, sys.stdin, write)
"""


def make(directory: Path, *words: str, close_seconds: float = 30.0) -> TrackerSink:
    (directory / "tracker.py").write_text(_TRACKER)
    command = [sys.executable, str(directory / "tracker.py"), str(directory / "told"), *words]
    return TrackerSink("wandb", command, {"a": 1}, total_steps=9, close_seconds=close_seconds)


def told(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "told").read_text().splitlines()]


def points(directory: Path) -> list[tuple[int, dict[str, float]]]:
    return [(step, values) for record in told(directory) for step, _, values in record.get("log", ())]


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_all_arrives_in_order_and_the_end_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = make(tmp_path)
    before = time.time()
    for step in range(1, 10):
        written.write(step, {"loss": step / 4, "language=ru": math.inf})
    written.write(9, {"kl/all": math.nan})
    written.close()
    written.close()
    written.write(10, {"loss": 0.0})  # too late, and no error
    records = told(tmp_path)
    assert records[0]["open"] == {"a": 1}
    assert records[-1] == {"close": True}
    assert [step for step, _ in points(tmp_path)] == [*range(1, 10), 9]
    assert points(tmp_path)[8][1] == {"loss": 2.25, "language=ru": math.inf}
    assert math.isnan(points(tmp_path)[9][1]["kl/all"])
    times = [seconds for record in records for _, seconds, _ in record.get("log", ())]
    assert times == sorted(times)
    assert before - 1 < times[0] < time.time() + 1
    assert ended(records[0]["pid"])
    assert capfd.readouterr() == ("", "")


def test_a_run_that_has_not_reached_its_end_says_so(tmp_path: Path) -> None:
    written = make(tmp_path)
    written.write(8, {"loss": 1.0})
    written.close()
    assert told(tmp_path)[-1] == {"close": False}


@pytest.mark.parametrize("word", ["hang", "hang-open", "hang-close"])
def test_a_tracker_that_hangs_holds_nothing_up(
    word: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "MOST_WAITING", 100)
    written = make(tmp_path, word, close_seconds=1.5)
    began = time.monotonic()
    for step in range(1, 1001):
        written.write(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    while not (tmp_path / "told").exists():  # so that the thread waits for an answer, for minutes
        os.sched_yield()
    written.close()
    assert time.monotonic() - began < 10.0
    assert ended(told(tmp_path)[0]["pid"])
    warnings = capfd.readouterr().err.splitlines()
    if word == "hang-close":
        assert "telemetry.wandb: it has not said that all has arrived: no answer in time" in warnings[0]
    else:
        assert "1000 of 1000 logged steps were not sent (no answer in time); metrics.jsonl has them" in warnings[0]
    assert len(warnings) == (2 if word == "hang-close" else 1)


def test_a_tracker_that_dies_is_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "_LEAST_PAUSE", 0.01)
    written = make(tmp_path, "die-once")
    for step in range(1, 10):
        written.write(step, {"loss": 1.0})
    while written.num_sent < 9:
        os.sched_yield()
    written.close()
    assert [step for step, _ in points(tmp_path)] == list(range(1, 10))
    warnings = capfd.readouterr().err.splitlines()
    assert warnings == [
        "warning: telemetry.wandb: its process ended with status -9; training goes on, and what is logged waits",
        "warning: telemetry.wandb: it answers again",
    ]


def test_what_fails_is_tried_again_and_told_once_without_passwords(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "_LEAST_PAUSE", 0.001)
    monkeypatch.setattr(sink, "_LONGEST_PAUSE", 0.001)
    written = make(tmp_path, "no-key")
    written.write(1, {"loss": 1.0})
    while not (tmp_path / "told").exists() or len(told(tmp_path)) < 3:
        os.sched_yield()
    written.close()
    assert capfd.readouterr().err.splitlines() == [
        "warning: telemetry.wandb: no key for https://***@host; training goes on, and what is logged waits",
        "warning: telemetry.wandb: 1 of 1 logged steps were not sent (no key for https://***@host); metrics.jsonl has "
        "them all",
    ]


def test_metrics_that_are_refused_are_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = make(tmp_path, "refuse-1")
    written.write(1, {"loss": 1.0})
    while not written.num_dropped:
        os.sched_yield()
    written.write(2, {"loss": 2.0})
    written.close()
    assert points(tmp_path) == [(2, {"loss": 2.0})]
    assert [line.split(": ", 2)[2] for line in capfd.readouterr().err.splitlines()] == [
        "it refuses metrics: step 1 is bad; training goes on without them",
        "1 of 2 logged steps were not sent; metrics.jsonl has them all",
    ]


def test_the_oldest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "MOST_WAITING", 3)
    written = make(tmp_path)
    with written._changed:  # the thread cannot take any
        for step in range(1, 6):
            written.write(step, {"loss": 1.0})
    written.close()
    assert [step for step, _ in points(tmp_path)] == [3, 4, 5]
    assert written.num_dropped == 2


def test_a_trainer_that_dies_leaves_a_tracker_that_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "told")
    (tmp_path / "tracker.py").write_text(_TRACKER)
    program = (
        "import os, sys; from tlite_jax.telemetry.trackers.sink import TrackerSink\n"
        "sink = TrackerSink('wandb', sys.argv[1:], {}, total_steps=9, close_seconds=9.0)\n"
        "sink.write(9, {'loss': 1.0})\n"
        "while not sink.num_sent: os.sched_yield()\n"
        "os._exit(1)"
    )
    tracker = [sys.executable, str(tmp_path / "tracker.py"), str(tmp_path / "told")]
    trainer = subprocess.Popen([sys.executable, "-c", program, *tracker])
    records = []
    while not records or "close" not in records[-1]:
        with (tmp_path / "told").open() as pipe:  # until the writer closes it
            records += [json.loads(line) for line in pipe]
    assert trainer.wait() == 1
    assert records[-1] == {"close": False}


def test_a_tracker_without_its_trainer_is_killed_whatever_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ORPHAN_SECONDS", 0.0)
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda *arguments: killed.append(arguments))
    process._end_as_orphan(parent=os.getpid())  # which is not the parent of this process
    assert killed == [(0, signal.SIGKILL)]
