"""The newest metrics as a file of Prometheus's text format, for the textfile collector of node_exporter."""

import math
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import replace_file

_SECONDS_APART = 1.0
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_]")
# The same in the files of all runs: Prometheus takes two texts for one metric as an error.
_HELP = "Newest value of a training run."


class PrometheusSink:
    """One gauge `tlite_NAME{run="..."}` per metric, written by a thread of its own at most once a second.

    What follows a "/" in a metric's name is the label `of`: `kl/lang=ru` is `tlite_kl{run="...",of="lang=ru"}`. Beside
    the metrics there are `tlite_step` and `tlite_updated_seconds` (since 1970), by which a silent run is found. A file
    that cannot be written while training goes on is warned of once and tried again with the next values.

    Args:
      path: *.prom, replaced atomically; node_exporter reads nothing else.
      run: what the label `run` says.
      calendar: seconds since 1970.

    Raises:
      UserError: the file cannot be written now.
    """

    def __init__(self, path: Path, run: str, *, calendar: Callable[[], float] = time.time):
        self._path, self._run, self._calendar = path, run, calendar
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        self._changed, self._closing = threading.Event(), threading.Event()
        self.num_failures = 0
        try:  # what an earlier start wrote stays, so that one that never trains is found by its age
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, path.read_bytes() if path.exists() else b"")
        except OSError as error:
            raise UserError(
                f"telemetry.prometheus: cannot write {path}: {error.strerror}; choose a directory that can be written"
            ) from error
        self._thread = threading.Thread(target=self._work, name="prometheus", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self._lock:
            self._values |= {**values, "step": float(step), "updated_seconds": self._calendar()}
        self._changed.set()

    def close(self) -> None:
        self._closing.set()
        self._changed.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._changed.wait()
            self._changed.clear()
            self._replace()
            self._closing.wait(_SECONDS_APART)
        if self._changed.is_set():
            self._replace()

    def _replace(self) -> None:
        with self._lock:
            values = dict(self._values)
        try:
            replace_file(self._path, exposition(values, self._run).encode())
        except OSError as error:
            if not self.num_failures:
                print(f"warning: cannot write {self._path}: {error.strerror}; training goes on", file=sys.stderr)
            self.num_failures += 1


def exposition(values: Mapping[str, float], run: str) -> str:
    """Metrics in Prometheus's text format, series of a metric together, no timestamps (node_exporter refuses them)."""
    metrics: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        metric, _, of = name.partition("/")
        labels = f'run="{_escaped(run)}"' + (f',of="{_escaped(of)}"' if of else "")
        metrics.setdefault("tlite_" + _NOT_IN_NAMES.sub("_", metric), {})[labels] = value
    lines: list[str] = []
    for metric, series in sorted(metrics.items()):
        lines += [f"# HELP {metric} {_HELP}", f"# TYPE {metric} gauge"]
        lines += [f"{metric}{{{labels}}} {_number(value)}" for labels, value in sorted(series.items())]
    return "".join(line + "\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else f"{'+' if value > 0 else '-'}Inf"
