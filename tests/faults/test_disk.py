"""A disk that fills up: the short form; `python -m tests.faults.disk` trains 50 runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.disk import Ballast, small_disk, why_not
from tests.faults.test_kills import QUICK
from tlite_jax.telemetry.metrics import JsonlSink, TensorBoardSink, read_jsonl

needs_root = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@needs_root
def test_a_run_on_a_disk_that_is_full_at_times_loses_nothing_but_those_saves() -> None:
    command = [sys.executable, "-m", "tests.faults.disk", "--count", "1", "--seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": QUICK})
    assert done.returncode == 0, done.stderr
    assert "1 runs on a disk that was full at times" in done.stdout


@needs_root
def test_metrics_of_a_full_disk_are_written_when_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with small_disk(tmp_path):
        sink, ballast = JsonlSink(tmp_path / "metrics.jsonl"), Ballast(tmp_path / "ballast")
        sink.write(0, {"loss": 0.0})
        ballast.leave(0)
        for step in range(1, 900):
            sink.write(step, {"loss": float(step)})
        assert (tmp_path / "metrics.jsonl").stat().st_size < 8192
        assert capsys.readouterr().err.count("No space left on device; its lines are held") == 1
        ballast.remove()
        sink.write(900, {"loss": 900.0})
        assert [line["loss"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(901))
        sink.close()


@needs_root
def test_tensorboard_events_of_a_full_disk_are_written_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path):
        sink, ballast = TensorBoardSink(tmp_path / "events"), Ballast(tmp_path / "ballast")
        ballast.leave(0)
        for step in range(200):
            sink.write(step, {"loss": float(step)})
        assert sum(path.stat().st_size for path in (tmp_path / "events").iterdir()) < 8192
        ballast.remove()
        sink.close()
        events = EventAccumulator(str(tmp_path / "events"), size_guidance={"scalars": 0}).Reload()
        assert [event.value for event in events.Scalars("loss")] == list(range(200))
