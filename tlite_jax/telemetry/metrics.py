"""Metrics of steps, written to several sinks at once: a JSONL file, TensorBoard, a console.

Values are plain floats: reading them back from devices, and when, is the caller's business. Only process 0 writes;
the other processes pass no sinks.
"""

import errno
import itertools
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from tlite_jax.errors import UserError
from tlite_jax.telemetry.evaluated import Evaluated
from tlite_jax.telemetry.line_file import LineFile

Metrics = dict[str, float]

_OWN_KEYS = ("step", "time")  # what a line of JSONL says beside the metrics
_numbers = itertools.count()  # of event files of this process


class Sink(Protocol):
    """Somewhere metrics go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of one step; may be called again for the same step with others."""

    def close(self) -> None:
        """Writes out what is held back; may be called twice."""


@runtime_checkable
class EvaluationSink(Protocol):
    """A sink that has more use for an evaluation than its metrics."""

    def write_evaluation(self, step: int, evaluated: Evaluated) -> None:
        """Takes the evaluation of one step."""


class MetricsWriter:
    """Writes each step's metrics to every sink, and closes them all, also when one of them fails.

    Args:
      sinks: where metrics go; none on processes other than 0.
    """

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = tuple(sinks)
        self._open = ExitStack()
        for sink in reversed(self._sinks):
            self._open.callback(sink.close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of one step.

        Args:
          step: number of completed steps.
          values: name -> scalar; anything `float` accepts. A device array would be waited for here.
        """
        clashes = [key for key in _OWN_KEYS if key in values]
        assert not clashes, f"metrics cannot be named {clashes}"
        floats = {name: float(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(step, floats)

    def write_evaluation(self, step: int, evaluated: Evaluated) -> None:
        """Writes an evaluation: all of it where a sink has `write_evaluation`, its metrics elsewhere."""
        for sink in self._sinks:
            if isinstance(sink, EvaluationSink):
                sink.write_evaluation(step, evaluated)
            else:
                sink.write(step, evaluated.metrics)

    def close(self) -> None:
        """Closes every sink; may be called twice."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonlSink:
    """One line of JSON per step: {"step": 3, "time": unix seconds, "loss": ...}, written out at once, or when a
    full disk has room again.

    Numbers that JSON lacks are written as the strings "nan", "inf" and "-inf". A last line torn by a crash is
    removed on opening.

    Args:
      path: the file; appended to when it is there.
      resume_step: completed steps of the checkpoint a run goes on from. Lines of later steps, left by the try that
        was interrupted, are removed atomically, so that the file has each step once. None keeps every line.

    Raises:
      UserError: the file cannot be written, or holds lines that are not metrics.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        with _mended_by_user(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_lines(path, resume_step)
            self._file = LineFile(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        record: dict[str, float | str] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars as TensorBoard events, without TensorFlow or torch; those that a full disk has no room for come later.

    Args:
      directory: gets one events file per try.
      resume_step: completed steps of the checkpoint a run goes on from; TensorBoard then hides the events of later
        steps from earlier tries (a SessionLog START event, as `purge_step` of torch's SummaryWriter).

    Raises:
      UserError: the directory cannot be written.
    """

    def __init__(self, directory: Path, resume_step: int | None = None):
        with _mended_by_user(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
            self._file = LineFile(directory / name)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def write_evaluation(self, step: int, evaluated: Evaluated) -> None:
        self.write(step, evaluated.metrics)
        for name, text in evaluated.texts.items():
            plugin = SummaryMetadata.PluginData(plugin_name="text")
            tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
            value = Summary.Value(tag=name, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))
            self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        self._file.write(_record(event.SerializeToString()))


def _record(content: bytes) -> bytes:
    """As TensorFlow frames records: length, its checksum, content, its checksum. TensorBoard's own writer computes CRCs
    in Python, which takes most of a step's telemetry.
    """
    length = struct.pack("<Q", len(content))
    return b"".join((length, _masked_crc(length), content, _masked_crc(content)))


def _masked_crc(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads what `JsonlSink` wrote.

    Args:
      path: the file. A torn last line, of a run that is writing or was killed, is left out.

    Returns:
      One record per step in order of steps: "step" (int), "time" (unix seconds) and the step's metrics (floats, nan
      and infinities included). Lines of the same step are merged, later values winning.

    Raises:
      UserError: no such file, or a line that is not metrics.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a run's metrics.jsonl") from error
    steps: dict[int, dict[str, Any]] = {}
    for step, values, _ in _lines(path, content):
        steps.setdefault(step, {"step": step}).update(values)
    return [steps[step] for step in sorted(steps)]


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that after a crash either the old or the new content is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _drop_lines(path: Path, resume_step: int | None) -> None:
    """Rewrites the file without a torn last line and without lines of steps after resume_step, if it has such."""
    content = path.read_bytes()
    lines = _lines(path, content)
    kept = b"".join(line for step, _, line in lines if resume_step is None or step <= resume_step)
    if kept != content:
        replace_file(path, kept)


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, Metrics, bytes]]:
    """Yields each line's step, numbers (time included) and bytes; a torn last line is passed over."""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record.pop("step")
            values = {name: float(value) for name, value in record.items()}
            whole = isinstance(step, int) and line.endswith(b"\n")
        except (ValueError, TypeError, AttributeError, KeyError):
            whole = False
        if whole:
            yield step, values, line
        elif number < len(lines):
            raise UserError(f"{path}:{number} is not a line of metrics; remove that line or move the file away")


@contextmanager
def _mended_by_user(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a directory that can be written") from error
