"""Ends a process that is stuck: a thread that looks at which section the training thread is in, and since when.

The training thread only notes a name and a time. When a section takes longer than its limit, or another process
raises the alarm, all stacks of this process are written to its log and to a file, and it ends with status 76.
A thread cannot look while native code holds Python's lock; a timer of the system covers that (`SIGALRM`, status 142).
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from tlite_jax.config.watchdog import WatchdogConfig

EXIT_RESTART = 76
POLL_SECONDS = 1.0
_JUST_AFTER = 0.01  # a limit, so that it has been passed
_LINGER_SECONDS = 3.0  # all processes have looked at the board by then
_STDERR = 2  # the descriptor: what sys.stderr has been replaced with may have none
_BACKSTOP_SECONDS = 120.0  # that the thread may be held up beyond a limit
_RECENT_STEPS = 500
_ENOUGH_STEPS = 8  # from which their percentile says something
_STEP, _WAIT = "step", "data_wait"
_LONG = ("restore", "compile", "checkpoint", "evaluation")
# The host runs up to two steps ahead, so that many steps may still wait for a process that was longer at a section.
_STEPS_AFTER_LONG = 3


class Board(Protocol):
    """Where processes of a job leave word for each other."""

    def alarm(self) -> str | None:
        """What another process, or this one, has raised; None when all is well."""

    def raise_alarm(self, text: str) -> None:
        """Tells all processes."""


class Limits:
    """How long the present section may take. Pure: durations come in, limits go out.

    Args:
      config: of the watchdog.
    """

    def __init__(self, config: WatchdogConfig):
        self._config = config
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._patience, self._patient_steps = config.compile, _STEPS_AFTER_LONG

    def of(self, section: str) -> float:
        """Seconds; sections are those of `telemetry.goodput`, and "other"."""
        if section not in (_STEP, _WAIT):
            return float(getattr(self._config, section))
        limit = self._config.step_floor
        if self._patient_steps or len(self._steps) < _ENOUGH_STEPS:
            return max(limit, self._patience)
        steps = sorted(self._steps.copy())
        return max(limit, self._config.step_factor * steps[int(0.99 * (len(steps) - 1) + 0.5)])

    def entered(self, section: str) -> None:
        """Notes that a section begins: steps after a long one may wait for processes that are still at it."""
        if section in _LONG:
            self._patience, self._patient_steps = float(getattr(self._config, section)), _STEPS_AFTER_LONG

    def stepped(self, seconds: float) -> None:
        """Notes the time from one step's batch to the next one's."""
        if self._patient_steps:
            self._patient_steps -= 1
        else:
            self._steps.append(seconds)


class Watchdog:
    """Watches this process from `start` to `close`.

    Args:
      config: limits.
      file: where stacks go, besides standard error; its directory is made when there are any.
      process: of the job, 0-based.
      board: of the job; None where this process is alone.
      ended: told why, before it ends.
      leave: ends the process.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        file: Path,
        process: int = 0,
        board: Board | None = None,
        *,
        ended: Callable[[str], object] = lambda reason: None,
        leave: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._file, self._process, self._board = config, file, process, board
        self._ended, self._leave, self._clock = ended, leave, clock
        self._limits = Limits(config)
        self._now = ("init", clock())
        self._batch_began: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Self:
        """Begins to watch; to be called on the main thread."""
        if self._config.enabled:
            # Written by the signal handler itself, which needs no lock, before the signal ends the process.
            faulthandler.register(signal.SIGALRM, file=_STDERR, all_threads=True, chain=True)
            self._thread.start()
        return self

    def enter(self, section: str) -> None:
        """Notes what the training thread does from now on."""
        now = self._clock()
        if section == _WAIT:
            if self._batch_began is not None:
                self._limits.stepped(now - self._batch_began)
            self._batch_began = now
        elif section in _LONG:
            self._batch_began = None
            self._limits.entered(section)
        self._now = (section, now)

    def look(self) -> str | None:
        """Returns why this process has to end, or None."""
        section, since = self._now
        spent, limit = self._clock() - since, self._limits.of(section)
        if spent > limit:
            return f"{self._name()} has been in {section} for {spent:.1f} s, of at most {limit:.1f}"
        with suppress(Exception):  # a board that cannot be reached is jax's business, whose heartbeats notice
            return self._board.alarm() if self._board is not None else None
        return None

    def close(self) -> None:
        """Ends watching; may be called twice."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)

    def _watch(self) -> None:
        pause = POLL_SECONDS
        while not self._closed.wait(pause):
            section, since = self._now
            left = max(0.0, since + self._limits.of(section) - self._clock())
            pause = min(POLL_SECONDS, left + _JUST_AFTER)
            signal.setitimer(signal.ITIMER_REAL, left + _BACKSTOP_SECONDS)
            reason = self.look()
            if reason is not None and not self._closed.is_set():
                self._end(reason)
                return

    def _end(self, reason: str) -> None:
        section, since = self._now
        where = f"{self._name()} is in {section} since {self._clock() - since:.1f} s"
        text = f"error: the watchdog ends this job, start it again: {reason}\n{where}; its stacks:\n"
        with suppress(Exception):
            sys.stderr.write(text)
            sys.stderr.flush()
            faulthandler.dump_traceback(_STDERR, all_threads=True)
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        with suppress(Exception):
            self._ended(reason)
        if self._board is not None:
            # On a thread of its own: one that cannot reach the board must end all the same.
            threading.Thread(target=_tell, args=(self._board, reason), daemon=True).start()
            # The others read the board before they miss this process; process 0 serves it, and goes last.
            time.sleep(_LINGER_SECONDS * (2 if self._process == 0 else 1))
        self._leave(EXIT_RESTART)

    def _name(self) -> str:
        return f"process {self._process} ({socket.gethostname()})"


def _tell(board: Board, text: str) -> None:
    with suppress(Exception):
        board.raise_alarm(text)
