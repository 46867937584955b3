"""The textfile sink: a strict reader of the format takes what it writes, and a disk that fails stops nothing."""

import math
import re
import threading
from pathlib import Path

import pytest

from tests import tiny
from tlite_jax.config import RunConfig
from tlite_jax.config_files import override, parse
from tlite_jax.errors import UserError
from tlite_jax.telemetry import prometheus
from tlite_jax.telemetry.prometheus import PrometheusSink, exposition

# https://prometheus.io/docs/instrumenting/exposition_formats, without timestamps
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_NUMBER = r"NaN|[+-]Inf|-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
_SERIES = re.compile(rf"(tlite_[a-zA-Z0-9_]+)\{{({_LABEL}(?:,{_LABEL})*)\}} ({_NUMBER})")


def read(text: str) -> dict[tuple[str, str], float]:
    """(metric, labels) -> value; HELP and TYPE come once, before the series of their metric, which lie together."""
    found: dict[tuple[str, str], float] = {}
    metrics: list[str] = []
    assert not text or text.endswith("\n")
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in metrics
            assert next(lines) == f"# TYPE {name} gauge"
            metrics.append(name)
            continue
        match = _SERIES.fullmatch(line)
        assert match, line
        metric, labels, number = match.groups()
        assert metric == metrics[-1]
        assert (metric, labels) not in found
        found[metric, labels] = float(number)
    return found


def test_every_kind_of_metric_is_read_back() -> None:
    values = {"loss": 2.5, "learning_rate": 1e-5, "bits_per_byte/all": 0.7, "bits_per_byte/language=ru": 0.8}
    values |= {"alert/kl/language=en": 1.0, "x-y z": -3.0, "a": math.inf, "b": -math.inf, "c": math.nan, "big": 1e22}
    found = read(exposition(values, "r"))
    assert math.isnan(found.pop(("tlite_c", 'run="r"')))
    assert found == {
        ("tlite_loss", 'run="r"'): 2.5,
        ("tlite_learning_rate", 'run="r"'): 1e-5,
        ("tlite_bits_per_byte", 'run="r",of="all"'): 0.7,
        ("tlite_bits_per_byte", 'run="r",of="language=ru"'): 0.8,
        ("tlite_alert", 'run="r",of="kl/language=en"'): 1.0,
        ("tlite_x_y_z", 'run="r"'): -3.0,
        ("tlite_a", 'run="r"'): math.inf,
        ("tlite_b", 'run="r"'): -math.inf,
        ("tlite_big", 'run="r"'): 1e22,
    }


def test_labels_are_escaped_and_one_metric_lies_together() -> None:
    text = exposition({"kl/z": 1.0, "kl.x": 2.0, "kl": 3.0, 'kl/\\"\n': 4.0}, 'a"\\\nb')
    assert len(read(text)) == 4
    assert r'tlite_kl{run="a\"\\\nb",of="\\\"\n"} 4.0' in text.splitlines()


def test_closing_leaves_the_newest_values_with_step_and_time(tmp_path: Path) -> None:
    path = tmp_path / "made" / "run.prom"
    sink = PrometheusSink(path, "r", calendar=lambda: 1700000000.25)
    for step in range(1, 101):
        sink.write(step, {"loss": step / 4})
    sink.write(100, {"kl/all": 0.5})  # an evaluation does not take the loss away
    sink.close()
    sink.close()
    found = {metric: value for (metric, _), value in read(path.read_text()).items()}
    assert found == {"tlite_loss": 25, "tlite_kl": 0.5, "tlite_step": 100, "tlite_updated_seconds": 1700000000.25}
    assert [file.name for file in path.parent.iterdir()] == ["run.prom"]


def test_many_steps_in_a_second_are_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents: list[bytes] = []
    written = threading.Event()

    def replace(path: Path, content: bytes) -> None:
        contents.append(content)
        if b"tlite_step" in content:
            written.set()

    monkeypatch.setattr(prometheus, "replace_file", replace)
    monkeypatch.setattr(prometheus, "_SECONDS_APART", 60.0)
    sink = PrometheusSink(tmp_path / "run.prom", "r")
    sink.write(1, {"loss": 1.0})
    assert written.wait(30)  # the first at once
    written.clear()
    sink.write(2, {"loss": 1.0})
    assert not written.wait(0.2)  # the second has to wait
    for step in range(3, 1000):
        sink.write(step, {"loss": 1.0})
    sink.close()  # and does not wait for the minute
    assert len(contents) == 3
    assert b'tlite_step{run="r"} 999.0' in contents[-1]


def test_what_an_earlier_start_wrote_stays_until_there_is_more(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    path.write_text(exposition({"step": 7.0}, "r"))
    sink = PrometheusSink(path, "r")
    assert read(path.read_text()) == {("tlite_step", 'run="r"'): 7}
    sink.write(8, {})
    sink.close()
    assert read(path.read_text())["tlite_step", 'run="r"'] == 8


def test_a_disk_that_fails_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = threading.Semaphore(0)

    def replace(path: Path, content: bytes) -> None:
        tries.release()
        raise OSError(28, "No space left on device")

    sink = PrometheusSink(tmp_path / "run.prom", "r")
    monkeypatch.setattr(prometheus, "replace_file", replace)
    monkeypatch.setattr(prometheus, "_SECONDS_APART", 0.0)
    for step in (1, 2, 3):
        sink.write(step, {"loss": 1.0})
        assert tries.acquire(timeout=30)
    sink.close()
    assert sink.num_failures >= 3
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 1


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.prom").mkdir()
    for path in (tmp_path / "file" / "run.prom", tmp_path / "directory.prom"):
        with pytest.raises(UserError, match=r"telemetry\.prometheus: cannot write .*; choose") as error:
            PrometheusSink(path, "r")
        assert "\n" not in str(error.value)


def test_another_ending_is_refused_with_the_right_one(tmp_path: Path) -> None:
    config = parse(RunConfig, tiny.values(tmp_path, tmp_path / "run"), "test")
    with pytest.raises(UserError, match=r"telemetry\.prometheus.*run\.prom"):
        override(config, ["telemetry.prometheus=/metrics/run.txt"])


def test_a_run_writes_its_metrics(tmp_path: Path) -> None:
    path = tmp_path / "node.prom"
    tiny.start(tiny.config(tmp_path / "ru-run", *tiny.from_imported(), "train.steps=2", f"telemetry.prometheus={path}"))
    found = read(path.read_text())
    assert found["tlite_step", 'run="ru-run"'] == 2
    assert found["tlite_loss", 'run="ru-run"'] == tiny.metrics(tmp_path / "ru-run", "loss")[2]
