"""An evaluation on the console, in JSONL and in TensorBoard."""

import io
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tlite_jax.telemetry.console import ConsoleSink
from tlite_jax.telemetry.evaluated import Evaluated, Table
from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter, TensorBoardSink

TABLE = Table(
    ("held-out text", "bits per byte", "change"),
    (("language=ru", "1.5000", "-0.5000"), ("language=en", "1.0300", "+0.0300")),
    alerts=("ALERT language=en: worse",),
    notes=("objective 1.5090",),
)
EVALUATED = Evaluated(
    {"bits_per_byte/language=ru": 1.5, "evaluation_seconds": 2.31}, TABLE, {"samples/0": "Привет,\nмир [bold]"}
)


def test_plain_lines_are_aligned(capsys):
    with MetricsWriter([ConsoleSink(200)]) as writer:
        writer.write_evaluation(40, EVALUATED)
    assert capsys.readouterr().out.splitlines() == [
        "step  40/200  evaluation, 2.3 s",
        "held-out text  bits per byte   change",
        "language=ru           1.5000  -0.5000",
        "language=en           1.0300  +0.0300",
        "ALERT language=en: worse",
        "objective 1.5090",
        "| Привет,",
        "| мир [bold]",
    ]


def test_without_a_table_it_is_a_line_of_metrics(capsys):
    with MetricsWriter([ConsoleSink(200)]) as writer:
        writer.write_evaluation(40, Evaluated({"score": 1.0}))
    assert capsys.readouterr().out == "step  40/200  score 1.0000\n"


def test_a_terminal_shows_a_table_above_the_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    terminal = Terminal()
    with MetricsWriter([ConsoleSink(200, stream=terminal)]) as writer:
        writer.write_evaluation(40, EVALUATED)
    shown = terminal.getvalue()
    assert "│ language=ru   │        1.5000 │ -0.5000 │" in shown
    assert "\x1b[1;31mALERT language=en: worse\x1b[0m" in shown
    assert "| мир [bold]" in shown


def test_files_have_numbers_and_text(tmp_path):
    sinks = [JsonlSink(tmp_path / "m.jsonl"), TensorBoardSink(tmp_path / "tb")]
    with MetricsWriter(sinks) as writer:
        writer.write_evaluation(40, EVALUATED)
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert (line["step"], line["bits_per_byte/language=ru"]) == (40, 1.5)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Scalars("bits_per_byte/language=ru")[0].value == pytest.approx(1.5)
    assert events.PluginTagToContent("text").keys() == {"samples/0"}
    (tensor,) = events.Tensors("samples/0")
    assert (tensor.step, tensor.tensor_proto.string_val[0].decode()) == (40, "Привет,\nмир [bold]")
