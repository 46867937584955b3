"""Readings of data wait and memory: which steps have them, and what they say."""

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tlite_jax.telemetry.goodput import Stopwatch
from tlite_jax.telemetry.resources import Resources, resident_bytes
from tlite_jax.train import loop


class Device:
    def __init__(self, stats: Mapping[str, int] | None):
        self._stats = stats

    def memory_stats(self) -> Mapping[str, int] | None:
        return self._stats


def test_the_wait_is_a_step_on_average_since_the_last_reading() -> None:
    resources = Resources([Device(None)], every=4, last=10, step=2, waited=1.0)
    read = {step: resources.read(step, 1.0 + step) for step in range(3, 11)}
    assert [step for step, values in read.items() if values] == [4, 8, 10]
    assert [read[step]["data_wait_seconds"] for step in (4, 8, 10)] == [2.0, 1.0, 1.0]
    assert "device_peak_bytes" not in read[4]


def test_the_fullest_device_counts() -> None:
    devices = [Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 7}), Device({"bytes_in_use": 9})]
    assert Resources(devices, every=1, last=1, step=0).read(1, 0.0)["device_peak_bytes"] == 7


def test_the_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = np.ones(64 << 20, np.uint8)
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert 0.8 * held.nbytes < after - before < 2 * held.nbytes


def test_a_run_logs_how_long_it_waited_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, late = loop.batches, 0.0

    def slow(*arguments, **options):
        nonlocal late
        for number, batch in enumerate(real(*arguments, **options), start=1):
            late += 1000.0 * number
            yield batch

    monkeypatch.setattr(loop, "batches", slow)
    monkeypatch.setattr(loop, "Stopwatch", functools.partial(Stopwatch, clock=lambda: time.monotonic() + late))
    words = ["train.steps=5", "train.log_every=3"]
    tiny.start(tiny.config(tmp_path / "run", *tiny.from_imported(), *words))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert [line["data_wait_seconds"] for line in lines] == pytest.approx([2000, 4500], abs=100)
    assert all(line["host_memory_bytes"] > 50e6 for line in lines)
