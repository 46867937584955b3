import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter, TensorBoardSink, read_jsonl


def write(sink, steps, loss=2.5):
    with MetricsWriter([sink]) as writer:
        for step in steps:
            writer.write(step, {"loss": loss + step, "learning_rate": 1e-5})


def test_one_line_a_step_that_is_valid_json(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter([JsonlSink(path)]) as writer:
        writer.write(1, {"loss": math.nan, "gradient_norm": math.inf, "z": -math.inf})
        writer.write(2, {"loss": 2.0, "domain/Наука": 1.5})
        lines = path.read_text(encoding="utf-8").splitlines()  # there before the writer is closed
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["loss"] for record in strict] == ["nan", 2.0]
    assert (strict[0]["gradient_norm"], strict[0]["z"]) == ("inf", "-inf")
    first, second = read_jsonl(path)
    assert math.isnan(first["loss"])
    assert (first["gradient_norm"], first["z"]) == (math.inf, -math.inf)
    assert second["step"] == 2
    assert second["domain/Наука"] == 1.5


def test_what_device_arrays_give_is_written_as_numbers(tmp_path):
    import jax.numpy as jnp

    with MetricsWriter([JsonlSink(tmp_path / "m")]) as writer:
        writer.write(1, {"loss": jnp.float32(0.5)})
    assert read_jsonl(tmp_path / "m")[0]["loss"] == 0.5


def test_resuming_leaves_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(JsonlSink(path), range(1, 13))
    write(JsonlSink(path, resume_step=8), range(9, 16), loss=100)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, 16))
    records = read_jsonl(path)
    assert records[7]["loss"] == 10.5
    assert records[8]["loss"] == 109
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_opening_without_a_step_appends(tmp_path):
    write(JsonlSink(tmp_path / "m"), [1, 2])
    write(JsonlSink(tmp_path / "m"), [3])
    assert [record["step"] for record in read_jsonl(tmp_path / "m")] == [1, 2, 3]


@example(cut=1, resume_step=None, tail=b"")  # a last line that lacks its newline only
@given(cut=st.integers(0, 400), resume_step=st.none() | st.integers(0, 6), tail=st.sampled_from([b"", b"\0" * 40]))
@settings(max_examples=60, deadline=None)
def test_a_file_torn_at_any_byte_goes_on(tmp_path_factory, cut, resume_step, tail):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    write(JsonlSink(path), range(1, 6))
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)] + tail)
    survivors = [record["step"] for record in read_jsonl(path)]
    assert survivors == list(range(1, len(survivors) + 1))
    write(JsonlSink(path, resume_step), [9])
    kept = [step for step in survivors if resume_step is None or step <= resume_step]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 9]


def test_two_writes_of_a_step_are_one_record(tmp_path):
    with MetricsWriter([JsonlSink(tmp_path / "m")]) as writer:
        writer.write(4, {"loss": 1.0})
        writer.write(4, {"bits_per_byte/ru": 0.9})
    (record,) = read_jsonl(tmp_path / "m")
    assert (record["loss"], record["bits_per_byte/ru"]) == (1.0, 0.9)


@pytest.mark.parametrize("line", ["not json", '{"loss": 1}', "[1]", '{"step": "a"}', '{"step": 1, "loss": "x"}'])
def test_a_file_of_something_else_is_refused_and_unharmed(tmp_path, line):
    path = tmp_path / "m"
    path.write_text(line + '\n{"step": 2}\n')
    for opening in (lambda: JsonlSink(path, 1), lambda: read_jsonl(path)):
        with pytest.raises(UserError, match=":1 is not a line of metrics"):
            opening()
    assert path.read_text() == line + '\n{"step": 2}\n'


def test_places_that_cannot_be_written_are_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for sink in (JsonlSink, TensorBoardSink):
        with pytest.raises(UserError, match="cannot write") as error:
            sink(tmp_path / "file" / "inner")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "absent")


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_reads_the_events_back(tmp_path):
    with MetricsWriter([TensorBoardSink(tmp_path)]) as writer:
        for step in range(1, 31):
            writer.write(step, {"loss": step / 4, "mfu": math.nan})
    assert scalars(tmp_path, "loss") == [(step, step / 4) for step in range(1, 31)]
    assert all(math.isnan(value) for _, value in scalars(tmp_path, "mfu"))


def test_tensorboard_hides_steps_after_the_one_resumed_from(tmp_path):
    write(TensorBoardSink(tmp_path), range(1, 13))
    write(TensorBoardSink(tmp_path, resume_step=8), [12], loss=100)
    assert scalars(tmp_path, "loss") == [*((step, 2.5 + step) for step in range(1, 9)), (12, 112)]


class Failing:
    def __init__(self):
        self.closed = False

    def write(self, step, values):
        raise OSError("disk full")

    def close(self):
        self.closed = True
        raise OSError("close failed")


def test_every_sink_is_closed_when_one_fails(tmp_path):
    failing, path = Failing(), tmp_path / "m"
    sink = JsonlSink(path)
    writer = MetricsWriter([failing, sink])
    with pytest.raises(OSError, match="disk full"):
        writer.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match="close failed"):
        writer.close()
    assert failing.closed
    with pytest.raises(ValueError, match="closed"):
        sink.write(1, {"loss": 1.0})
    writer.close()


def test_no_sinks_write_nothing():
    with MetricsWriter([]) as writer:
        writer.write(1, {"loss": 1.0})
