"""bench/checkpoint.py works, at a small size."""

import sys
from pathlib import Path

import pytest

from bench import checkpoint


def test_it_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(checkpoint, "_WIDTHS", small)
    monkeypatch.setattr(checkpoint, "_VOCAB", 64)
    monkeypatch.setattr(
        sys, "argv", ["checkpoint.py", "--gigabytes", "0.001", "--repeats", "1", "--scratch", str(tmp_path)]
    )
    checkpoint.main()
    printed = capsys.readouterr().out
    assert "| save |" in printed
    assert "| verify and restore |" in printed
    assert "blocked: " in printed
    assert list(tmp_path.iterdir()) == []
