"""A wall clock that jumps, backwards too, changes nothing that is learned, nor which checkpoint is the newest."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk

YEAR = 365 * 86_400.0


def test_nothing_is_ordered_by_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["checkpoint.every=2", "checkpoint.keep_latest=2", f"schedule.total_steps={tiny.STEPS}"]
    words += [f"data.mixture.tokens={tiny.STEPS * tiny.BATCH_SIZE * tiny.LENGTH}", *tiny.from_imported()]
    tiny.start(tiny.config(tmp_path / "steady", *words))
    run, started = tmp_path / "skewed", time.time()
    asked = _run_backwards(monkeypatch, started + YEAR)
    tiny.start(tiny.config(run, *words, "train.steps=4"))
    for step, age in ((2, 0.0), (4, YEAR)):  # the newest step looks the oldest
        _touch(run / "checkpoints" / str(step), started - age)
    _run_backwards(monkeypatch, started - YEAR)
    assert tiny.start(tiny.config(run, *words)).step == tiny.STEPS
    assert next(asked) > 4
    assert steps_on_disk(run) == steps_on_disk(tmp_path / "steady")
    tiny.assert_same_state(find(run), find(tmp_path / "steady"))
    assert tiny.metrics(run) == tiny.metrics(tmp_path / "steady")


def _run_backwards(monkeypatch: pytest.MonkeyPatch, first: float) -> Iterator[int]:
    """Each look at the clock finds it 5 seconds earlier. (A leap of 10 minutes forward fails Orbax's save.)"""
    asked = itertools.count()

    def now() -> float:
        return first - 5.0 * next(asked)

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now() * 1e9))
    return asked


def _touch(directory: Path, seconds: float) -> None:
    for path in (*directory.rglob("*"), directory):
        os.utime(path, (seconds, seconds))
