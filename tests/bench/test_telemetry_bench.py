"""The bench of the metrics' cost: every variant is measured, and the limit decides the exit status."""

import re
import sys
from pathlib import Path

import pytest

from bench import telemetry


@pytest.mark.parametrize(("limit", "status"), [(10**9, 0), (0, 1)])
def test_every_variant_is_measured(
    limit: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(telemetry, "_LIMIT_MICROSECONDS", limit)
    words = ["--steps", "3", "--repeats", "1", "--pause", "0", "--scratch", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["telemetry.py", *words])
    with pytest.raises(SystemExit) as exit_:
        telemetry.main()
    assert int(exit_.value.code or 0) == status
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == [
        *("jsonl", "tensorboard", "prometheus", "wandb", "mlflow", "all", "readings", "parts", "pace")
    ]
    assert all(int(mean) > 0 for _, mean, _ in rows)
    assert not list(tmp_path.iterdir())
