"""A sink that sends metrics to a tracker, and that nothing waits for: the tracker may be slow, silent or gone."""

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from tlite_jax.telemetry.trackers.link import Link, LinkError
from tlite_jax.telemetry.trackers.redact import one_line

MOST_WAITING = 10_000  # logged steps that are kept for a tracker that does not take them
_MOST_AT_ONCE = 200
_OPEN_SECONDS, _LOG_SECONDS = 180.0, 120.0
_LEAST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_GRACE_SECONDS = 0.5  # for the thread to see by itself that the time to close is over


class TrackerSink:
    """Sends what is written to a tracker, from a thread that speaks to a process of the tracker's own.

    What fails is tried again, at longer and longer intervals; the first failure of each kind of trouble is warned of.
    What has not been sent when too much waits, or at the end, is counted and told.

    Args:
      name: of the field in the config, for people.
      command: starts the tracker's process.
      settings: for `open`.
      total_steps: at which the run ends.
      close_seconds: that `close` waits at most.
    """

    def __init__(
        self, name: str, command: list[str], settings: Mapping[str, Any], *, total_steps: int, close_seconds: float
    ):
        self._name, self._command, self._settings = name, command, settings
        self._total_steps, self._close_seconds = total_steps, close_seconds
        self._waiting: deque[tuple[int, float, Mapping[str, float]]] = deque()
        self._changed = threading.Condition()
        self._closing, self._deadline = False, float("inf")
        self._link: Link | None = None
        self._failing, self._told_refused, self._finished = False, False, False
        self._pause, self._reason = _LEAST_PAUSE, ""
        self.num_sent = self.num_dropped = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self._changed:
            if self._closing:
                return
            if len(self._waiting) == MOST_WAITING:
                self._waiting.popleft()
                self.num_dropped += 1
            self._waiting.append((step, time.time(), values))
            self._finished = step >= self._total_steps
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._closing, self._deadline = True, time.monotonic() + self._close_seconds
            self._changed.notify()
        self._thread.join(self._close_seconds + _GRACE_SECONDS)
        link = self._link
        if self._thread.is_alive() and link is not None:
            link.kill()  # which wakes the thread
            self._thread.join(1.0)
        lost = self.num_dropped + len(self._waiting)
        if lost:
            why = f" ({self._reason})" if self._reason else ""
            self._warn(f"{lost} of {lost + self.num_sent} logged steps were not sent{why}; metrics.jsonl has them all")

    def _work(self) -> None:
        while self._wait_for_points():
            was_closing = self._closing
            if self._attempt():
                continue
            if was_closing:
                break
            with self._changed:
                self._changed.wait_for(lambda: self._closing, self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if not self._waiting and self._link is not None:
            try:
                self._link.ask({"close": self._finished}, self._seconds(_LOG_SECONDS))
            except LinkError as error:
                self._warn(f"it has not said that all has arrived: {one_line(str(error))}")
        self._drop_link()

    def _wait_for_points(self) -> bool:
        """Returns False when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return bool(self._waiting)

    def _attempt(self) -> bool:
        """Sends some of what waits; tells of the first failure, and forgets a link that is broken."""
        try:
            self._send(self._opened())
        except (LinkError, OSError) as error:
            if isinstance(error, LinkError) and error.broken:
                self._drop_link()
            self._reason = one_line(str(error))
            if not self._failing and not self._closing:
                self._failing = True
                self._warn(f"{self._reason}; training goes on, and what is logged waits")
            return False
        self._reason = ""
        if self._failing:
            self._failing = False
            self._warn("it answers again")
        self._pause = _LEAST_PAUSE
        return True

    def _opened(self) -> Link:
        if self._link is None:
            link = self._link = Link(self._command)
            try:
                url = link.ask({"open": self._settings}, self._seconds(_OPEN_SECONDS))["url"]
            except LinkError:
                self._drop_link()
                raise
            if url:
                print(f"telemetry.{self._name}: {url}", flush=True)
        return self._link

    def _send(self, link: Link) -> None:
        with self._changed:
            points = [self._waiting[place] for place in range(min(_MOST_AT_ONCE, len(self._waiting)))]
        try:
            link.ask({"log": points}, self._seconds(_LOG_SECONDS))
        except LinkError as error:
            if not error.refused:
                raise
            self._taken(points, dropped=True)
            if not self._told_refused:
                self._told_refused = True
                self._warn(f"it refuses metrics: {one_line(str(error))}; training goes on without them")
        else:
            self._taken(points, dropped=False)

    def _taken(self, points: list[Any], *, dropped: bool) -> None:
        """Removes points that no longer wait; some of them may have had to make room meanwhile."""
        with self._changed:
            for point in points:
                if self._waiting and self._waiting[0] is point:
                    self._waiting.popleft()
                    if dropped:
                        self.num_dropped += 1
                    else:
                        self.num_sent += 1

    def _seconds(self, usual: float) -> float:
        """How long to wait for an answer, which at the end is not long."""
        return max(0.0, min(usual, self._deadline - time.monotonic()))

    def _warn(self, text: str) -> None:
        print(f"warning: telemetry.{self._name}: {text}", file=sys.stderr, flush=True)

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
