"""What becomes of a process that jax's runtime aborts: status 76, which asks for a restart.

jax's coordination client calls abort() as soon as it hears that another process of the job, or the coordinator, is
gone, and where not all processes have come in time. Its own hook for that, `missed_heartbeat_callback`, cannot be a
Python function: jaxlib throws std::bad_cast on the way to it, and aborts. So the signal of abort() is caught.
"""

import ctypes
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from tlite_jax.telemetry.watchdog import EXIT_RESTART

LOST = "lost another process of the job, start it again: jax's message above says which"
_STDERR = 2
_kept: list[Any] = []  # handlers that C knows of


def restart_on_abort(explain: Callable[[], str] = lambda: LOST) -> None:
    """From now on abort(), on any thread, writes a line and all Python stacks and ends with 76 instead of 134.

    The handler runs Python, and so waits for Python's lock like any thread; where native code keeps that for good, the
    watchdog's timer ends the process.

    Args:
      explain: gives the line; replaces that of an earlier call.
    """

    def end(_: int) -> None:
        with suppress(BaseException):
            os.write(_STDERR, f"error: {explain()}\n".encode())
            faulthandler.dump_traceback(_STDERR, all_threads=True)
        os._exit(EXIT_RESTART)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _kept.append(handler)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


class Overheard:
    """Reads what native code writes to standard error, and passes it on."""

    def __enter__(self) -> Self:
        self._text = b""
        self._real = os.dup(_STDERR)
        self._reader, writer = os.pipe()
        os.dup2(writer, _STDERR)
        os.close(writer)
        self._thread = threading.Thread(target=self._pass_on, name="overheard", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._real, _STDERR)  # closes the pipe's end, which ends the thread
        self._thread.join(1.0)
        os.close(self._real)

    def last_words(self) -> str:
        """All that was written, where the last of it was written a moment ago; from now on nothing is overheard."""
        length = -1
        while length != len(self._text):
            length = len(self._text)
            time.sleep(0.1)
        os.dup2(self._real, _STDERR)
        return self._text.decode(errors="replace")

    def _pass_on(self) -> None:
        with os.fdopen(self._reader, "rb", buffering=0) as reader:
            while chunk := reader.read(65536):
                self._text += chunk
                os.write(self._real, chunk)
