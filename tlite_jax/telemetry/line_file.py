"""A file that lines or records are appended to, and that a full disk costs nothing but a delay."""

import errno
import os
import sys
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class LineFile:
    """Appends lines, each written out at once; those that a full disk has no room for are held until it has.

    Args:
      path: appended to.

    Raises:
      OSError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._held = b""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def write(self, line: bytes) -> None:
        """Appends a line, after those that are held.

        Raises:
          OSError: what has nothing to do with the room there is.
        """
        was_held = bool(self._held)
        self._held += line
        try:
            self._write_held()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not was_held:
                print(
                    f"warning: {self._path}: {error.strerror}; its lines are held until there is room", file=sys.stderr
                )

    def close(self) -> None:
        """Brings everything to the disk; may be called twice.

        Raises:
          OSError: there is no room for lines that are held.
        """
        if self._file.closed:
            return
        try:
            self._write_held()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _write_held(self) -> None:
        while self._held:
            self._held = self._held[self._file.write(self._held) :]
