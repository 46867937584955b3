"""Executes one program in this process: started by `execute.py`, never imported.

As in MERA 1.1.0, the source runs with a module's globals and a function's locals: a function of the program sees
neither its own imports at the top nor the program's other functions, itself included, by name.
"""

import ast
import contextlib
import ctypes
import faulthandler
import io
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

Handler = Callable[[int, object], None]

MEMORY_BYTES, FILE_BYTES, OPEN_FILES = 4 << 30, 1 << 20, 64
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
# What a program's functions find without importing it.
_GLOBALS = {
    module.__name__: module
    for module in (contextlib, faulthandler, io, multiprocessing, os, platform, signal, tempfile)
}


class _OutOfTimeError(Exception):
    """The source took too long to execute."""


def main() -> None:
    """Reads a program from standard input and writes its results to standard output."""
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    _limit(request["total_seconds"])

    def out_of_time(signum: int, frame: object) -> None:
        answer.write(json.dumps("timed out"))
        answer.flush()
        os._exit(0)

    results = _results(request, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, 0)
    answer.write(json.dumps(results))
    answer.flush()
    os._exit(0)


def _results(request: dict[str, Any], out_of_time: Handler) -> list[str | None]:
    tests = ast.literal_eval(request["tests"])
    names: dict[str, Any] = {}
    try:
        _alarm(request["define_seconds"], _raise)
        exec(request["source"], dict(_GLOBALS), names)
        function = names[request["entry_point"]]
    except BaseException:
        return [None] * len(tests)
    _alarm(request["total_seconds"], out_of_time)
    results: list[str | None] = []
    for test in tests:
        try:
            result = function(**test)
            results.append(None if result is None else str(result))
        except BaseException:
            results.append(None)
    return results


def _raise(signum: int, frame: object) -> None:
    raise _OutOfTimeError


def _alarm(seconds: float, handler: Handler) -> None:
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit(seconds: float) -> None:
    """Memory, files and processes; and no network, where the kernel lets us leave it."""
    libc = ctypes.CDLL(None)
    if libc.unshare(_NEW_NETWORK) != 0:
        libc.unshare(_NEW_USER | _NEW_NETWORK)
    cpu = int(2 * seconds) + 1
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


if __name__ == "__main__":
    main()
