"""Progress of reading or writing a model's tensors: a bar on a terminal, one line elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def tensor_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with (tensors done, tensors in all)."""
    console = Console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started, tensors = time.monotonic(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)

        def report(done: int, total: int) -> None:
            nonlocal tensors
            tensors = done
            progress.update(task, completed=done, total=total)

        yield report
    print(f"{label}: {tensors} tensors in {time.monotonic() - started:.1f} s", flush=True)
