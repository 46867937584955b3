"""Measures this process's own part of a step, and lets process 0 compare it with the others'.

The training thread reads a clock a few times a step. At every `watchdog.pace_every`-th step it waits for the step
before, does a unit of work on accelerators (about 5 ms), and waits for the step: the only step that is not started
ahead. What it measured goes to process 0 by the coordinator's key-value store, on a thread of its own, which also
notices when the whole process stands still or gets no CPU. Nothing that goes wrong here ends training.
"""

import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from launch.job.delays import ThreadDelay, busiest, threads
from tlite_jax.config import RunConfig, WatchdogConfig
from tlite_jax.telemetry.line_file import LineFile
from tlite_jax.telemetry.stragglers import FILE, Finding, Judge, Pace

if TYPE_CHECKING:
    from launch.job.peers import JobBoard
    from launch.job.unit_of_work import UnitOfWork
    from tlite_jax.train.step import Step

_PULSE_SECONDS, _LATE_SECONDS = 0.02, 0.01
_GATHER_SECONDS, _ASK_SECONDS = 10.0, 0.2
_APART = ("checkpoint", "evaluation")  # sections that take part in no step


@contextmanager
def watch_pace(
    config: RunConfig, board: "JobBoard | None", process: int, num_processes: int
) -> Iterator["PaceWatch | None"]:
    """Of this start; None where the process is alone, or the config wants none."""
    if board is None or not config.watchdog.pace_every:
        yield None
        return
    with closing(PaceWatch(config.watchdog, board, process, num_processes, config.output / FILE).start()) as watch:
        yield watch


class PaceWatch:
    """Of one start of a job of several processes.

    Args:
      config: of the watchdog.
      board: of the job.
      process, num_processes: this one, and how many there are.
      file: RUN/stragglers.jsonl, of process 0; made when there is something to say.
    """

    def __init__(self, config: WatchdogConfig, board: "JobBoard", process: int, num_processes: int, file: Path):
        self._every, self._board = config.pace_every, board
        self._process, self._num_processes, self._file = process, num_processes, file
        self._judge = Judge(config.slow_ratio)
        self._exchange: queue.SimpleQueue[tuple[int, Pace] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pace", daemon=True)
        self._unit: UnitOfWork | None = None
        self._on_cpu = False
        self._previous: Any = None
        self._section, self._since = "other", time.perf_counter()
        self._left: float | None = None
        self._data_wait = self._apart = self._own = 0.0
        self._steps = 0
        self._closed = threading.Event()

    def start(self) -> Self:
        """Begins to exchange."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the exchange; may be called twice."""
        self._closed.set()
        self._exchange.put(None)
        if self._thread.is_alive():
            self._thread.join(_GATHER_SECONDS)

    def enter(self, section: str) -> None:
        """Notes what the training thread does from now on; sections are those of `telemetry.goodput`."""
        now = time.perf_counter()
        if self._section == "data_wait":
            self._data_wait += now - self._since
        elif self._section in _APART:
            self._apart += now - self._since
        self._section, self._since = section, now

    def around(self, step_fn: "Step", start_step: int) -> "Step":
        """The step, measured; `start_step` were computed before the first call."""
        import jax

        self._on_cpu = jax.local_devices()[0].platform == "cpu"
        step = start_step
        delay = ThreadDelay()

        def measured(state: Any, batch: Any) -> Any:
            nonlocal step
            step += 1
            began = time.perf_counter()
            self._own += 0.0 if self._left is None else began - self._left
            if self._previous is not None and step % self._every == 0:
                state, metrics = self._measure(step, step_fn, state, batch)
            else:
                state, metrics = step_fn(state, batch)
                self._own += time.perf_counter() - began
                if self._previous is not None:
                    already = delay.seconds()
                    jax.block_until_ready(self._previous)  # what the log waits for next, too
                    self._own += delay.seconds() - already  # no wait for devices
            self._steps += 1
            self._previous, self._left = metrics["loss"], time.perf_counter()
            return state, {**metrics, **self._metrics()}

        return measured

    def _measure(self, step: int, step_fn: "Step", state: Any, batch: Any) -> Any:
        import jax

        jax.block_until_ready(self._previous)
        unit = self._work_alone()
        began = time.perf_counter()
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(metrics)
        device = time.perf_counter() - began
        steps = max(1, self._steps)
        data_wait = self._data_wait / steps
        other = max(0.0, max(0.0, self._own - self._apart) / steps - data_wait)
        on_cpu = self._on_cpu
        self._exchange.put((step, Pace(socket.gethostname(), data_wait, other, device, unit, on_cpu, 0.0, 0.0, 0.0)))
        self._data_wait = self._apart = self._own = 0.0
        self._steps = 0
        return state, metrics

    def _work_alone(self) -> float:
        """Seconds of a unit of work; 0 where it cannot be done, as on a device that has no memory left."""
        from launch.job.unit_of_work import UnitOfWork

        if self._on_cpu:  # what else runs beside it would be most of what is seen
            return 0.0
        try:
            if self._unit is None:
                self._unit = UnitOfWork()
            return self._unit.seconds()
        except Exception:
            return 0.0

    def _metrics(self) -> dict[str, float]:
        slowest = self._judge.slowest
        if slowest is None:
            return {}
        return {"slowest_process": float(slowest[0]), "slowest_process_ratio": slowest[1]}

    def _work(self) -> None:
        first = True  # its interval has the compilation in it
        pulse, ran, since = _Pulse(), threads(), time.perf_counter()
        while True:
            try:
                given = self._exchange.get(timeout=_PULSE_SECONDS)
            except queue.Empty:
                pulse.came()
                continue
            if given is None:
                return
            step, pace = given
            now, moment = threads(), time.perf_counter()
            running, delayed = (spent / (moment - since) for spent in busiest(ran, now))
            pace = pace._replace(stalled=pulse.stalled(), running=running, delayed=delayed)
            if not first:
                with suppress(Exception):
                    self._compare(step, pace)
            first, ran, since = False, now, moment
            pulse.restart()

    def _compare(self, step: int, pace: Pace) -> None:
        self._board.tell_pace(step, self._process, json.dumps(pace))
        if self._process != 0:
            return
        end = time.monotonic() + _GATHER_SECONDS
        found = self._board.paces(step)
        while len(found) < self._num_processes and time.monotonic() < end and not self._closed.wait(_ASK_SECONDS):
            found = self._board.paces(step)
        self._board.forget_paces(step)
        if len(found) == self._num_processes:
            for finding in self._judge.add({process: Pace(*json.loads(text)) for process, text in found.items()}):
                self._report(step, finding)

    def _report(self, step: int, finding: Finding) -> None:
        print(f"warning: step {step}: {finding.text()}", file=sys.stderr, flush=True)
        line = {"step": step, "time": round(time.time(), 3), **finding._asdict(), "text": finding.text()}
        file = LineFile(self._file)
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.close()


class _Pulse:
    """Of the thread that makes it: it sleeps, and may wake late, because all of the process was stopped."""

    def __init__(self) -> None:
        self._delay = ThreadDelay()
        self.restart()

    def restart(self) -> None:
        """Forgets what was."""
        self._seen = self._stood = 0.0
        self._sleep()

    def came(self) -> None:
        """To be called after `_PULSE_SECONDS`."""
        took = time.perf_counter() - self._asleep
        late = took - _PULSE_SECONDS - (self._delay.seconds() - self._delayed)  # to have no CPU is counted apart
        if late > _LATE_SECONDS:
            self._stood += late + _PULSE_SECONDS / 2  # it began somewhere within the pulse
        self._seen += took
        self._sleep()

    def stalled(self) -> float:
        """The share of the time in which the process stood still."""
        return min(1.0, self._stood / self._seen) if self._seen else 0.0

    def _sleep(self) -> None:
        self._asleep, self._delayed = time.perf_counter(), self._delay.seconds()
