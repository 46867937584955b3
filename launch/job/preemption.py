"""Signals that ask a training process to make room, where the training loop does not answer them.

While steps are computed and the last checkpoint is written the loop does (in a job of several processes jax does, from
the moment of joining on). Before, nothing is worth saving, and after, everything is saved.
"""

import os
import signal
import sys
import threading
from types import FrameType

EXIT_PREEMPTED = 75


def notice_signals() -> None:
    """Answers SIGTERM with status 75, and SIGUSR1 as if it were SIGTERM.

    To be called before a job is joined, whose SIGTERM handler is jax's.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def ignore_signals() -> None:
    """Lets the process end with the status that it has: Python, on its way out, would let a second signal kill it."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def _stop(number: int, _: FrameType | None) -> None:
    ignore_signals()
    print(f"stopped by {signal.Signals(number).name} outside of training; run again to go on", file=sys.stderr)
    raise SystemExit(EXIT_PREEMPTED)
