"""Which process of a job the others wait for, and why. Pure: what each process measured comes in, findings go out.

A sharded step takes equally long on all processes: its collectives wait for the slowest one. So each process measures
what is its own, and the pace that it would have alone is worked out from that:

    max(its host's own time between two steps, the device time of a step x how slow its devices are)

The host's own time is waiting for data and everything else that the training thread does but waiting for devices. The
device time of a step is the least that any process saw between starting it and its end: the last one to start it waits
for nobody. How slow accelerators are is measured by a computation that takes part in no collective. Devices that are
CPUs are slow while their process stands still, and when it gets less of a CPU than the others do. A process is a
straggler when its pace is that much worse than the median of the others', in most of the last intervals, and by more
than the others' noise.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

FILE = "stragglers.jsonl"  # of a run: a line for each finding
WINDOW = 8  # intervals that are looked at
_ENOUGH = 4  # from which they say something
_LEAST = 0.01  # of the time that a process runs, as far as that is believed
_NOISE = 5 * 1.4826  # median absolute deviations of the others; 1.4826 of them are a standard deviation


class Pace(NamedTuple):
    """What one process measured over an interval of steps, in seconds.

    Attributes:
      host: the machine's name.
      data_wait, other: of the host's own time, a step.
      device: from starting a step, nothing else under way, to its end.
      unit: that a fixed computation took on its devices alone; 0: not known.
      on_cpu: whether its devices are CPUs.
      stalled: share of the time in which the whole process stood still.
      running, delayed: shares of the time in which its busiest thread ran, and in which it was ready and had no CPU.
    """

    host: str
    data_wait: float
    other: float
    device: float
    unit: float
    on_cpu: bool
    stalled: float
    running: float
    delayed: float


class Finding(NamedTuple):
    """A process that has become a straggler, or has ceased to be one.

    Attributes:
      ratio: its time for a step over the median of the others'; medians over the window, as all numbers here.
      data_wait, other: shares of its time for a step.
      device_ratio: how slow its devices are, over the median of the others'.
    """

    process: int
    host: str
    slow: bool
    ratio: float
    data_wait: float
    other: float
    device_ratio: float
    stalled: float
    delayed: float

    def text(self) -> str:
        """One line for people."""
        name = f"process {self.process} ({self.host})"
        if not self.slow:
            return f"{name} keeps up with the others again"
        host = f"data wait {self.data_wait:.0%}, the rest of its host's work {self.other:.0%}"
        causes = [host]
        if self.data_wait + self.other < 0.99:
            causes.insert(0, f"its devices take {self.device_ratio:.1f} times as long for the same work")
        if self.stalled >= 0.1:
            causes.append(f"it stood still {self.stalled:.0%} of the time")
        if self.delayed >= 0.1:
            causes.append(f"it waits for a CPU {self.delayed:.0%} of the time")
        return f"{name} is {self.ratio:.1f} times slower than the median of the others: {', '.join(causes)}"


class Judge:
    """Compares processes over the last intervals.

    Args:
      slow_ratio: from which a process is a straggler.
    """

    def __init__(self, slow_ratio: float):
        self._slow_ratio = slow_ratio
        self._intervals: deque[Mapping[int, Finding]] = deque(maxlen=WINDOW)
        self._slow: set[int] = set()
        self.slowest: tuple[int, float] | None = None
        """The process with the worst pace and its ratio; None before there are enough intervals."""

    def add(self, paces: Mapping[int, Pace]) -> list[Finding]:
        """Takes what all processes measured over the same interval; returns what is new."""
        self._intervals.append(compare(paces))
        if len(self._intervals) < _ENOUGH:
            return []
        summary = {process: self._over_window(process) for process in paces}
        worst = max(summary.values(), key=lambda one: one.ratio)
        self.slowest = worst.process, worst.ratio
        found = []
        for process, one in summary.items():
            if process not in self._slow and self._is_slow(process, one.ratio):
                self._slow.add(process)
                found.append(one)
            elif process in self._slow and one.ratio < 1 + (self._slow_ratio - 1) / 2:
                self._slow.remove(process)
                found.append(one._replace(slow=False))
        return found

    def _over_window(self, process: int) -> Finding:
        ones = [interval[process] for interval in self._intervals]
        parts = ("ratio", "data_wait", "other", "device_ratio", "stalled", "delayed")
        return ones[-1]._replace(**{part: median(getattr(one, part) for one in ones) for part in parts})

    def _is_slow(self, process: int, ratio: float) -> bool:
        mine = [interval[process].ratio for interval in self._intervals]
        others = [
            one.ratio
            for interval in self._intervals
            for number, one in interval.items()
            if number != process and number not in self._slow
        ]
        center = median(others) if others else 1.0
        noise = median(abs(other - center) for other in others) if others else 0.0
        often = sum(one >= self._slow_ratio for one in mine) >= 0.75 * len(mine)
        return often and ratio >= max(self._slow_ratio, center + _NOISE * noise)


def compare(paces: Mapping[int, Pace]) -> dict[int, Finding]:
    """One interval: each process against the median of the others."""
    step = min(pace.device for pace in paces.values())
    slowness = {process: _slowness(process, paces) for process in paces}
    slowest = max(slowness.values())
    alone = {
        process: max(pace.data_wait + pace.other, step * slowness[process] / slowest) for process, pace in paces.items()
    }
    result = {}
    for process, pace in paces.items():
        others = [number for number in paces if number != process]
        result[process] = Finding(
            process,
            pace.host,
            True,
            _ratio(alone[process], [alone[number] for number in others]),
            pace.data_wait / alone[process] if alone[process] else 0.0,
            pace.other / alone[process] if alone[process] else 0.0,
            _ratio(slowness[process], [slowness[number] for number in others]),
            pace.stalled,
            pace.delayed,
        )
    return result


def _slowness(process: int, paces: Mapping[int, Pace]) -> float:
    """Of a process's devices: proportional to the time that they take for the same work."""
    pace = paces[process]
    unit = pace.unit or median([other.unit for other in paces.values() if other.unit] or [1.0])
    if not pace.on_cpu:
        return unit
    others = [other for number, other in paces.items() if number != process] or [pace]
    return unit / max(_LEAST, 1 - pace.stalled) * _starved(pace, others)


def _starved(pace: Pace, others: Sequence[Pace]) -> float:
    """How much slower than others a process is for want of a CPU; at least 1.

    A thread that waits for another process may sleep or look again and again. It then seems to get its CPU more
    easily than one that works, or to miss it for longer: only where both are worse is it short of a CPU.
    """

    def of_the_time(one: Pace) -> float:
        return max(_LEAST, 1 - one.delayed)

    def of_what_it_wants(one: Pace) -> float:
        return max(_LEAST, one.running / (one.running + one.delayed)) if one.delayed > 0 else 1.0

    return max(1.0, min(median(map(gets, others)) / gets(pace) for gets in (of_the_time, of_what_it_wants)))


def _ratio(value: float, others: Sequence[float]) -> float:
    middle = median(others) if others else value
    return value / middle if middle else 1.0
