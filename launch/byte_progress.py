"""Progress of reading or writing weights: a bar with bytes and time left on a terminal, one line elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with (bytes done, bytes in all)."""
    console = Console()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started, reached = time.monotonic(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)

        def report(done: int, total: int) -> None:
            nonlocal reached
            reached = done
            progress.update(task, completed=done, total=total)

        yield report
    seconds, megabytes = max(time.monotonic() - started, 1e-3), reached / 1e6
    print(f"{label}: {megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.0f} MB/s)", flush=True)
