"""How long threads of this process were ready to run and had no CPU, as Linux counts it; elsewhere it is nothing.

Another process's turn and a CPU limit of a control group both count. Sleeping, stopped and swapped threads do not.
"""

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

_THREADS = Path("/proc/self/task")


class Ran(NamedTuple):
    """Of a thread since its beginning, in seconds: on a CPU, and ready to run without one."""

    running: float
    delayed: float


class ThreadDelay:
    """Of the thread that makes it. Asking takes about 2 us."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        with suppress(OSError):
            self._file = (_THREADS / str(threading.get_native_id()) / "schedstat").open("rb", buffering=0)

    def seconds(self) -> float:
        """That it has been ready to run without a CPU; to be asked by the thread itself."""
        return _parsed(os.pread(self._file.fileno(), 64, 0)).delayed if self._file is not None else 0.0


def threads() -> dict[int, Ran]:
    """All threads of this process; none where the system does not count."""
    found = {}
    for directory in _THREADS.glob("*"):
        try:
            found[int(directory.name)] = _parsed((directory / "schedstat").read_bytes())
        except OSError:  # it has ended
            continue
    return found


def busiest(before: Mapping[int, Ran], after: Mapping[int, Ran]) -> Ran:
    """What the thread that wanted a CPU for longest did between two `threads`."""
    never = Ran(0.0, 0.0)
    spent = (
        Ran(now.running - before.get(one, never).running, now.delayed - before.get(one, never).delayed)
        for one, now in after.items()
    )
    return max(spent, key=sum, default=never)


def _parsed(text: bytes) -> Ran:
    running, delayed, _ = text.split()
    return Ran(int(running) / 1e9, int(delayed) / 1e9)
