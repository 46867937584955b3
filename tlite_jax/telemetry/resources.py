"""What a run waits for and how much memory it takes, beside the metrics of the steps that are logged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tlite_jax.telemetry.metrics import Metrics


class Device(Protocol):
    """What is asked of a jax device."""

    def memory_stats(self) -> Mapping[str, Any] | None:
        """Bytes by name; None where the backend does not count."""


class Resources:
    """Takes readings at the steps that are logged.

    Args:
      devices: those of this process.
      every, last: steps that are logged: the multiples of `every`, and `last`.
      step: completed steps that this start begins with.
      waited: seconds waited for data up to there.
    """

    def __init__(self, devices: Sequence[Device], *, every: int, last: int, step: int, waited: float = 0.0):
        self._devices, self._every, self._last_step = devices, every, last
        self._before = step, waited

    def read(self, step: int, waited: float) -> Metrics:
        """Takes a reading when the step is one that is logged.

        Args:
          step: number of steps whose data has arrived.
          waited: seconds waited for their data, over the whole start.

        Returns:
          data_wait_seconds, a step on average since the reading before; host_memory_bytes, of this process now, where
          the system tells; device_peak_bytes, the highest so far of any device, where the backend tells. Nothing at
          other steps.
        """
        if step % self._every and step != self._last_step:
            return {}
        (before, waited_before), self._before = self._before, (step, waited)
        readings = {"data_wait_seconds": (waited - waited_before) / (step - before)}
        peaks = [stats["peak_bytes_in_use"] for stats in self._stats() if "peak_bytes_in_use" in stats]
        if peaks:
            readings["device_peak_bytes"] = float(max(peaks))
        host = resident_bytes()
        return readings if host is None else {**readings, "host_memory_bytes": float(host)}

    def _stats(self) -> list[Mapping[str, Any]]:
        return [device.memory_stats() or {} for device in self._devices]


def resident_bytes() -> int | None:
    """Memory of this process that lies in RAM; None where the system does not tell (not Linux)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), None)
