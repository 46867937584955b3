"""One trainer to a run directory: two would delete each other's half-written checkpoints."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tlite_jax.errors import UserError

FILE = ".lock"
WAIT_SECONDS = 60.0  # for a trainer that is about to end, as after a requeue


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a run directory; the lock ends with the process, however that ends.

    Where the file system has no locks (some mounts of Lustre and NFS), nothing is held.

    Raises:
      UserError: another process still holds it after WAIT_SECONDS.
    """
    with (directory / FILE).open("a+") as file:
        _wait(file.fileno(), directory)
        with contextlib.suppress(OSError):  # a full disk; who holds it is for people only
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _wait(descriptor: int, directory: Path) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                holder = (directory / FILE).read_text().strip() or "another process"
                raise UserError(f"{directory} is being trained by {holder}; wait for it or end it") from error
            time.sleep(min(1.0, WAIT_SECONDS / 10))
        except OSError:  # no locks here
            return
