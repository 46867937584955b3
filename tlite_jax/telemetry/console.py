"""What a person watching a run sees: a live progress bar on a terminal, plain lines everywhere else."""

import atexit
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from tlite_jax.telemetry.evaluated import Evaluated, Table

_RATE_WINDOW = 20  # logged steps that the time left is estimated from
_WIDE = 112  # columns from which a terminal has room for all of it


class ConsoleSink:
    """Shows steps as they are logged.

    On a terminal: one live bar with loss, learning rate, tokens a second and the time left, that prints of the
    program scroll above. Elsewhere (a file, a pipe, a dumb terminal): one line of plain text per write. Metrics
    without a loss (an evaluation) are a line of their own in both. Signals are left alone; the terminal is restored
    by `close`, and at the latest when the interpreter exits.

    Args:
      total_steps: at which the run ends.
      start_step: completed steps it begins with, more than 0 when it resumes.
      description: what the bar is labelled with.
      stream: where to write; None is standard output.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        description: str = "train",
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stdout if stream is None else stream
        self._total_steps = total_steps
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW)
        self._progress: Progress | None = None
        if _is_live(self._stream):
            self._progress = _make_progress(self._stream)
            self._task = self._progress.add_task(
                description, total=total_steps, completed=start_step, status="compiling the first step"
            )
            self._progress.start()
            atexit.register(self.close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" not in values:
            self._line(step, "  ".join(f"{name} {_number(value)}" for name, value in values.items()))
            return
        seconds_left = self._seconds_left(step)
        if self._progress is None:
            self._line(step, _status(values, seconds_left, shown=_ALL))
        else:
            shown = _ALL if self._progress.console.width >= _WIDE else _ESSENTIAL
            self._progress.update(self._task, completed=step, status=_status(values, seconds_left, shown=shown))

    def write_evaluation(self, step: int, evaluated: Evaluated) -> None:
        """A table, alerts and samples of text; a line where there is no table."""
        if evaluated.table is None:
            self.write(step, evaluated.metrics)
            return
        seconds = evaluated.metrics.get("evaluation_seconds", math.nan)
        self._line(step, "evaluation" if math.isnan(seconds) else f"evaluation, {seconds:.1f} s")
        if self._progress is None:
            print(*evaluated.table.lines(), sep="\n", file=self._stream, flush=True)
        else:
            _print_table(self._progress.console, evaluated.table)
        for text in evaluated.texts.values():
            self._print(f"| {text}".replace("\n", "\n| "))

    def close(self) -> None:
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.stop()
            atexit.unregister(self.close)

    def _line(self, step: int, text: str) -> None:
        self._print(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {text}")

    def _print(self, text: str) -> None:
        if self._progress is None:
            print(text, file=self._stream, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self, step: int) -> float:
        """At the pace of the last logged steps; nan before there are two."""
        self._seen.append((step, self._clock()))
        (first_step, first_time), (_, now) = self._seen[0], self._seen[-1]
        if step <= first_step:
            return math.nan
        return max(0, self._total_steps - step) * (now - first_time) / (step - first_step)


def _is_live(stream: TextIO) -> bool:
    return stream.isatty() and Console(file=stream).is_interactive


def _make_progress(stream: TextIO) -> Progress:
    console = Console(file=stream)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20 if console.width >= _WIDE else 8),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
        refresh_per_second=4,
        # What the program prints scrolls above the bar, but only what would go to this terminal anyway.
        redirect_stdout=stream is sys.stdout,
        redirect_stderr=sys.stderr.isatty(),
    )


def _print_table(console: Console, content: Table) -> None:
    table = RichTable(
        *(Column(name, justify="right" if number else "left") for number, name in enumerate(content.header))
    )
    for row in content.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for alert in content.alerts:
        console.print(Text(alert, style="bold red"), soft_wrap=True)
    for note in content.notes:
        console.print(Text(note), soft_wrap=True)


def _status(values: Mapping[str, float], seconds_left: float, *, shown: Collection[str]) -> str:
    """What is shown and known of a step and of the pace, each of constant width so that lines align."""
    parts = [_FORMATS[name](values[name]) for name in shown if name in values]
    if not math.isnan(seconds_left):
        parts.append(f"eta {_duration(seconds_left)}")
    return "  ".join(parts)


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def _count(value: float) -> str:
    """At most five characters: 950, 3.21k, 288k, 1.10M."""
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5 or unit == "G":
            break
        value /= 1000
    digits = 0 if not unit or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def _duration(seconds: float) -> str:
    """0:07:31, or 3d 04:20 from a day on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{seconds:02d}"


_FORMATS: Mapping[str, Callable[[float], str]] = {
    "loss": "loss {:7.4f}".format,
    "gradient_norm": "norm {:6.2f}".format,
    "learning_rate": "lr {:.2e}".format,
    "tokens_per_second": lambda value: f"{_count(value):>5} tok/s",
    "mfu": "mfu {:5.1%}".format,
}
_ALL = tuple(_FORMATS)
_ESSENTIAL = ("loss", "learning_rate", "tokens_per_second")
