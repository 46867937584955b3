"""The process that speaks to one tracker.

    python -m tlite_jax.telemetry.trackers.process wandb|mlflow

answers each line of JSON on stdin with one on stdout:

    {"open": settings}                                -> {"url": where the run can be seen}
    {"log": [[step, unix seconds, {name: value}]]}    -> {}
    {"close": whether the run has reached its end}    -> {}

or with {"error": a line, "refused": whether trying again is of no use}.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

Point = tuple[int, float, Mapping[str, float]]
ORPHAN_SECONDS = 30.0
_DEFAULTS = {
    # What is measured of users is between them and us.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # The trainer's side tries again, for as long as the run lasts.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class RefusedError(Exception):
    """The tracker will not have what it was given, however often it is tried."""


class Tracker(Protocol):
    """A run in a tracker; made from the settings, it is open."""

    url: str | None

    def log(self, points: Sequence[Point]) -> None:
        """Sends metrics; raises when they have not arrived, RefusedError when they never will."""

    def close(self, finished: bool) -> None:
        """Waits until all has arrived, and says how the run ended."""


def serve(make: Callable[[Mapping[str, Any]], Tracker], lines: Iterable[str], write: Callable[[str], object]) -> None:
    """Answers requests until one says to close, or there are no more: then the trainer has died."""
    tracker: Tracker | None = None
    for line in lines:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "open" in request:
                tracker = make(request["open"])
                answer = {"url": tracker.url}
            elif tracker is not None and "log" in request:
                tracker.log(request["log"])
            elif tracker is not None:
                tracker.close(request["close"])
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__, "refused": isinstance(error, RefusedError)}
        write(json.dumps(answer) + "\n")
        if "close" in request:
            return
    if tracker is not None:
        tracker.close(False)


def _end_as_orphan(parent: int) -> None:
    """Ends this process and its own some time after its parent has gone, whatever it is at."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serves the tracker that the command line names; what its library prints goes to stderr."""
    threading.Thread(target=_end_as_orphan, args=(os.getppid(),), daemon=True).start()
    # A scheduler signals every process of a job; this one ends when the trainer says so.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(answer: str) -> None:
        answers.write(answer)
        answers.flush()

    def make(settings: Mapping[str, Any]) -> Tracker:
        module = importlib.import_module(f"tlite_jax.telemetry.trackers.{sys.argv[1]}_run")
        tracker: Tracker = module.open_run(settings)
        return tracker

    serve(make, sys.stdin, write)


if __name__ == "__main__":
    main()
