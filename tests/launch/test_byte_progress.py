"""Progress of reading and writing weights: bytes, speed and time left on a terminal, one plain line elsewhere."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import rich.console

import launch.export
import launch.import_
from launch.byte_progress import byte_progress
from tests import tiny


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 120 columns is sent."""
    sent = io.StringIO()
    console = rich.console.Console(file=sent, force_terminal=True, width=120)
    monkeypatch.setattr("launch.byte_progress.Console", lambda: console)
    return sent


def test_a_terminal_shows_bytes_speed_and_time_left(screen: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with byte_progress("reading model") as report:
        report(0, 16_000_000_000)
        report(4_000_000_000, 16_000_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert re.search(r"reading model .*4\.0/16\.0 GB.*\d+:\d\d:\d\d", shown), shown
    assert re.fullmatch(r"reading model: 4000\.0 MB in \d+\.\d s \(\d+ MB/s\)\n", capsys.readouterr().out)


def test_elsewhere_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with byte_progress("writing model") as report:
        report(5_000_000, 5_000_000)
    assert re.fullmatch(r"writing model: 5\.0 MB in \d+\.\d s \(\d+ MB/s\)\n", capsys.readouterr().out)


def test_both_directions_count_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, tuple[int, int]] = {}

    class Kept:
        def __init__(self, label: str) -> None:
            self._label = label.split()[0]

        def __enter__(self) -> Callable[[int, int], None]:
            return lambda done, total: said.update({self._label: (done, total)})

        def __exit__(self, *error: object) -> None:
            pass

    for command in (launch.import_, launch.export):
        monkeypatch.setattr(command, "byte_progress", Kept)
    launch.export.export_model(tiny.data() / "imported", tmp_path / "hf")
    launch.import_.import_model(str(tmp_path / "hf"), tmp_path / "run")
    weights = (tmp_path / "hf" / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "hf" / "model.safetensors").read_bytes()[:8], "little")
    assert said == dict.fromkeys(("writing", "reading"), (weights - header, weights - header))
