"""Work on slices of tensors, a few slices ahead of whoever writes them."""

import concurrent.futures
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SLICE_VALUES = 1 << 22  # 16 MB of float32
MAX_WORKERS = 32
Task = TypeVar("Task")
Result = TypeVar("Result")


def row_slices(shape: tuple[int, ...], unit: int = 1, values: int = SLICE_VALUES) -> Iterator[slice]:
    """Runs of rows that hold about `values` values, multiples of `unit` rows but for the last. Vectors stay whole."""
    num_rows, row_length = shape[0], 1
    for size in shape[1:]:
        row_length *= size
    step = num_rows if len(shape) < 2 else max(values // max(row_length, 1) // unit, 1) * unit
    for begin in range(0, num_rows, max(step, 1)):
        yield slice(begin, min(begin + step, num_rows))


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Yields the result of every task, in order; threads, one a core, work on those that follow."""
    num_workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        under_way: deque[concurrent.futures.Future[Result]] = deque()
        try:
            for task in tasks:
                under_way.append(pool.submit(work, task))
                if len(under_way) > num_workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
