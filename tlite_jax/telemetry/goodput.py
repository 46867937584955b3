"""Where the wall-clock of a run went, over all its starts: what trained the model, what was overhead, what was lost.

`Stopwatch` appends to RUN/goodput.jsonl while the run goes on; `account` adds the lines up. Durations come from a
monotonic clock. Only the gap between two starts is taken from the calendar, and never counted below zero, so a
clock that is set back costs a run no accuracy elsewhere.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tlite_jax.errors import UserError
from tlite_jax.telemetry.history import read_history
from tlite_jax.telemetry.line_file import LineFile

FILE = "goodput.jsonl"
# What a start spends its time on; what is in none of them, and not between two steps, is "other".
SECTIONS = ("init", "restore", "compile", "data_wait", "step", "checkpoint", "evaluation")
PARTS = (*SECTIONS, "other", "lost", "restart_wait")
_FLUSH_SECONDS = 5.0


class Stopwatch:
    """Notes what one start of a run spends its time on. Process 0 writes; elsewhere `path` is None.

    Args:
      path: RUN/goodput.jsonl, appended to.
      step: completed steps that this start begins with.
      environment: facts about this start, JSON-like (versions, devices, mesh).
      spent: seconds per section that passed before this object could be made.
      entered: called with the name of each section that begins, and with "other" when it ends.
      clock, calendar: seconds, monotonic, and since 1970.
    """

    def __init__(
        self,
        path: Path | None,
        step: int,
        environment: Mapping[str, Any],
        *,
        spent: Mapping[str, float] | None = None,
        entered: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        calendar: Callable[[], float] = time.time,
    ):
        self._entered = entered or (lambda section: None)
        self._clock, self._calendar = clock, calendar
        self._spent = dict.fromkeys(SECTIONS, 0.0) | dict(spent or {})
        self._began = clock() - sum(self._spent.values())
        self._step, self._written = step, clock()
        self._file = None
        if path is not None:
            try:
                _drop_torn_line(path)
                self._file = LineFile(path)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._write("begin", environment=dict(environment))

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Counts what happens inside as `name`, one of SECTIONS; sections do not nest."""
        began = self._clock()
        self._entered(name)
        try:
            yield
        finally:
            self._entered("other")
            self.add(name, self._clock() - began)

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds as `name`."""
        self._spent[name] += seconds

    def spent(self, name: str) -> float:
        """Seconds counted as `name` so far."""
        return self._spent[name]

    def reached(self, step: int) -> None:
        """Notes that `step` steps are done; writes a line every few seconds."""
        self._step = step
        if self._clock() - self._written >= _FLUSH_SECONDS:
            self._write("progress")

    def __enter__(self) -> Self:
        """Left by an error, the start is noted as ended by it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("done" if kind is None else kind.__name__)

    def close(self, status: str) -> None:
        """Writes how this start ended; may be called twice, the first counts."""
        if self._file is not None and not self._file.closed:
            self._write("end", status=status)
            self._file.close()

    def _write(self, event: str, **values: Any) -> None:
        self._written = self._clock()
        if self._file is None:
            return
        line = {
            "event": event,
            "time": round(self._calendar(), 3),
            "step": self._step,
            "seconds": round(self._clock() - self._began, 3),
            "spent": {name: round(seconds, 3) for name, seconds in self._spent.items()},
            **values,
        }
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


@dataclass(frozen=True)
class Start:
    """One start of a run, as far as it is known.

    Attributes:
      begin_time: seconds since 1970.
      first_step, last_step: completed steps when it began and when it was last heard of.
      seconds: from its begin to its last line.
      spent: seconds per section.
      status: how it ended; None when it was killed, or still goes on.
      environment: as given to `Stopwatch`.
      steps: (completed steps, seconds of section step so far) of each line.
    """

    begin_time: float
    first_step: int
    last_step: int
    seconds: float
    spent: dict[str, float]
    status: str | None
    environment: dict[str, Any]
    steps: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Account:
    """Wall-clock seconds of a whole run.

    Attributes:
      parts: seconds per name of PARTS; together all of `seconds`.
      seconds: from the first begin to the last line.
      goodput: share of it that computed steps which count.
      starts: every start, in order.
    """

    parts: dict[str, float]
    seconds: float
    goodput: float
    starts: tuple[Start, ...]


def read_starts(path: Path) -> tuple[Start, ...]:
    """Reads what `Stopwatch` wrote; a torn last line is left out.

    Raises:
      UserError: a line is something else.
    """
    groups: list[list[dict[str, Any]]] = []
    for record in read_history(path):
        if record.get("event") == "begin":
            groups.append([])
        if not groups:
            raise UserError(f"{path} is not what a run wrote about its time; move the file away")
        groups[-1].append(record)
    return tuple(_start(group) for group in groups)


def note_end(path: Path, status: str) -> None:
    """Notes how a start ended that cannot say so itself, being stuck; the time since its last line is not counted.

    Nothing is written where it has said how it ended, or there is no file.

    Raises:
      OSError: the file cannot be read or written.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines else {"event": "end"}
    if last["event"] != "end":
        last.pop("environment", None)
        line = json.dumps({**last, "event": "end", "status": status}, ensure_ascii=False)
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")


def account(starts: Sequence[Start]) -> Account:
    """Adds up the starts of a run.

    Steps that a later start did again are "lost": of the time that the earlier start computed steps, the part after
    the step that the later one went on from. What passed between a start's last line and the next start's begin is
    "restart_wait"; a killed start's last line is up to a few seconds old, and those count there too.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for number, start in enumerate(starts):
        known = sum(start.spent.values())
        for name, seconds in start.spent.items():
            parts[name if name in parts else "other"] += seconds
        parts["other"] += max(0.0, start.seconds - known)
        if number + 1 < len(starts):
            following = starts[number + 1]
            lost = start.spent.get("step", 0.0) - _step_seconds_at(start, following.first_step)
            parts["step"] -= lost
            parts["lost"] += lost
            parts["restart_wait"] += max(0.0, following.begin_time - start.begin_time - start.seconds)
    total = sum(parts.values())
    return Account(parts, total, parts["step"] / total if total else 0.0, tuple(starts))


def _step_seconds_at(start: Start, step: int) -> float:
    """Seconds that a start had computed steps for when it reached `step`, between its lines in proportion."""
    before = (start.first_step, 0.0)
    if step <= start.first_step:
        return 0.0
    for reached, seconds in start.steps:
        if reached >= step:
            share = (step - before[0]) / (reached - before[0]) if reached > before[0] else 1.0
            return before[1] + share * (seconds - before[1])
        before = reached, seconds
    return start.spent.get("step", 0.0)


def _start(lines: Sequence[Mapping[str, Any]]) -> Start:
    first, last = lines[0], lines[-1]
    return Start(
        # The begin line is written some seconds into the start, by its own count.
        begin_time=first["time"] - first["seconds"],
        first_step=first["step"],
        last_step=max(line["step"] for line in lines),
        seconds=last["seconds"],
        spent=dict(last["spent"]),
        status=last.get("status"),
        environment=first.get("environment", {}),
        steps=tuple((line["step"], line["spent"].get("step", 0.0)) for line in lines),
    )


def process_age() -> float:
    """Seconds since this process was started, imports included; 0 where the system does not tell (not Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return 0.0


def _drop_torn_line(path: Path) -> None:
    """Removes what a crash left of a line at the end."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
