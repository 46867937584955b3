"""A wall clock that jumps, backwards too, changes nothing that is learned, nor which checkpoint is the newest."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.telemetry.goodput import FILE, account, read_starts

YEAR = 365 * 86_400.0


WORDS = ["checkpoint.every=2", "checkpoint.keep_latest=2", f"schedule.total_steps={tiny.STEPS}"]
WORDS += [f"data.mixture.tokens={tiny.STEPS * tiny.BATCH_SIZE * tiny.LENGTH}"]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under a clock that is right."""
    run = tmp_path_factory.mktemp("clock") / "steady"
    tiny.start(tiny.config(run, *WORDS, *tiny.from_imported()))
    return run


def test_nothing_is_ordered_by_the_wall_clock(tmp_path: Path, steady: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, *tiny.from_imported()]
    run, started = tmp_path / "skewed", time.time()
    asked = _run_backwards(monkeypatch, started + YEAR)
    tiny.start(tiny.config(run, *words, "train.steps=4"))
    for step, age in ((2, 0.0), (4, YEAR)):  # the newest step looks the oldest
        _touch(run / "checkpoints" / str(step), started - age)
    _run_backwards(monkeypatch, started - YEAR)
    assert tiny.start(tiny.config(run, *words)).step == tiny.STEPS
    assert next(asked) > 4
    assert steps_on_disk(run) == steps_on_disk(steady)
    tiny.assert_same_state(find(run), find(steady))
    assert tiny.metrics(run) == tiny.metrics(steady)


def test_a_leap_of_an_hour_while_training_costs_at_most_a_save(
    tmp_path: Path, steady: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ahead, steps = time.time, [0.0], itertools.count(1)
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + ahead[0]) * 1e9))

    def leaping(step_fn):
        def step(state, batch):
            if next(steps) == 3:  # step 2 may be under way to the disk
                ahead[0] = 3600.0
            return step_fn(state, batch)

        return step

    run = tmp_path / "leapt"
    assert tiny.start(tiny.config(run, *WORDS, *tiny.from_imported()), around_step=leaping).step == tiny.STEPS
    assert ahead[0]
    assert tiny.STEPS in steps_on_disk(run)
    tiny.assert_same_state(find(run), find(steady))
    assert tiny.metrics(run) == tiny.metrics(steady)
    spent = account(read_starts(run / FILE))
    assert spent.seconds < 600  # durations are not the calendar's


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
