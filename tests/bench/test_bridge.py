"""The bridge's benchmark runs, and notices bytes that do not come back."""

from pathlib import Path

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
