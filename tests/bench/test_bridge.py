"""The bridge's benchmark runs, and notices bytes that do not come back."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import bridge


def test_every_step_is_measured_and_bytes_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(bridge.__file__).parent.parent))
    rows = bridge.run("tiny", tmp_path)
    assert [row.step for row in rows] == ["HF -> checkpoint", "checkpoint -> HF", "checkpoint -> Q4_K_M"]
    weights = 2 * 4096 * 256 * 2
    assert all(row.read_bytes > weights / 2 and row.peak_bytes > 10**7 for row in rows)
    assert rows[1].written_bytes > weights > rows[2].written_bytes
    assert all(row.ratio > 0 for row in rows)
    assert all(row.peak_bytes < 4e9 for row in rows)


def test_the_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.shutil, "disk_usage", lambda path: SimpleNamespace(free=30 * 10**9))
    bridge.require_room(bridge.model_config("1b"), tmp_path)
    with pytest.raises(SystemExit, match=r"30 GB free, 42 needed; give another --scratch"):
        bridge.require_room(bridge.model_config("8b"), tmp_path)
