"""Tasks in several processes of this machine; a process that is killed costs only the tasks it had."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tlite_jax.errors import UserError

# Pools in a row that broke before any task was done.
_MAX_BROKEN = 3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_tasks(
    work: Callable[[Any], Any],
    tasks: Sequence[Any],
    num_workers: int,
    progress: Callable[[int, int], None],
    *,
    start: Callable[..., None],
    start_arguments: tuple[Any, ...],
) -> list[Any]:
    """Runs tasks in spawned processes and returns their results in the order of the tasks.

    A killed process breaks its pool. What was not done is then done by another pool.

    Args:
      work: a task -> its result; importable, and doing a task twice does no harm.
      tasks: what travels to the processes.
      num_workers: how many processes.
      progress: called with (done, total).
      start: called with `start_arguments` when a process starts.

    Raises:
      UserError: processes end before anything is done, three times in a row.
      Exception: whatever `work` raises.
    """
    results: dict[int, Any] = {}
    broken = 0
    while len(results) < len(tasks):
        todo = [number for number in range(len(tasks)) if number not in results]
        done_before = len(results)
        # Spawned, not forked: the parent may hold threads of jax.
        context = multiprocessing.get_context("spawn")
        size = min(num_workers, len(todo))
        pool = ProcessPoolExecutor(size, context, initializer=_begin, initargs=(os.getpid(), start, start_arguments))
        try:
            futures: dict[Future[Any], int] = {pool.submit(work, tasks[number]): number for number in todo}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                progress(len(results), len(tasks))
        except BrokenProcessPool as error:
            broken = broken + 1 if len(results) == done_before else 0
            if broken == _MAX_BROKEN:
                mend = "lower data.prepare.num_workers and start again"
                raise UserError(f"processes were killed {broken} times, out of memory perhaps: {mend}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [results[number] for number in range(len(tasks))]


def _begin(parent: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Prepares a process, which is to end with its parent: nobody else would ever tell it to."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    start(*arguments)
