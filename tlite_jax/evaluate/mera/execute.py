"""Runs programs that a model wrote, each in a process of its own with limits on time, memory and files.

The limits keep mistakes from doing harm; they are no wall against a program that means it. The caller asks the user
first (`--allow-code-execution`).
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

TIMED_OUT = "timed out"
Results = list[str | None] | str  # of each test as text, None: it failed; or TIMED_OUT

_RUNNER = Path(__file__).with_name("program_runner.py")
_GRACE_SECONDS = 15  # for an interpreter to start on a busy machine; the runner itself keeps the time of the program


@dataclass(frozen=True)
class Program:
    """A program and what it is tried on.

    Attributes:
      source: Python source.
      entry_point: name of the function to call.
      tests: a Python literal: list of keyword arguments.
      define_seconds: for executing the source.
      total_seconds: for that and all calls.
    """

    source: str
    entry_point: str
    tests: str
    define_seconds: float = 3.0
    total_seconds: float = 4.0


def run_program(program: Program) -> Results:
    """Runs one program and says what its function returned.

    Returns:
      `str` of each result, None where a call raised or returned None; all None where the source did not run or has no
      such function; TIMED_OUT.
    """
    environment = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": os.defpath}
    with tempfile.TemporaryDirectory(prefix="tlite-program-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(_RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={**environment, "HOME": directory, "TMPDIR": directory},
            start_new_session=True,
        )
        try:
            request = json.dumps(asdict(program)).encode()
            output, _ = process.communicate(request, timeout=program.total_seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            _end(process)
    try:
        results = json.loads(output)
    except ValueError:  # it was ended by a limit, or ended itself
        return TIMED_OUT
    return results if isinstance(results, (list, str)) else TIMED_OUT


def run_programs(programs: Sequence[Program], progress: Callable[[int, int], None]) -> list[Results]:
    """Runs programs, as many at once as there are processors.

    Args:
      programs: what to run.
      progress: called with (done, all).
    """
    results: list[Results] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for result in pool.map(run_program, programs):
            results.append(result)
            progress(len(results), len(programs))
    return results


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait()
