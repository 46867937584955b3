"""One arrow's command, in a process of its own: its output shown and kept, signals passed on."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from tlite_jax.errors import UserError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Runner:
    """Runs commands one after another.

    Args:
      lock: held open by each command, so that no other recipe starts while an orphan of a killed one still writes.
      show: what takes the commands' output besides their logs.
    """

    def __init__(self, lock: IO[str], show: IO[str]):
        self._lock, self._show = lock, show
        self._process: subprocess.Popen[bytes] | None = None
        self.signal: int | None = None

    def run(self, words: Sequence[str], log: Path, stdout: Path | None = None) -> int:
        """Runs `python -m launch WORDS`; returns its exit status, 128 + a signal's number if one ended it.

        Args:
          words: of the command.
          log: appended to.
          stdout: where standard output goes, whole or not at all; None: to the log, as standard error does.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        scratch = None if stdout is None else stdout.with_name(f"{stdout.name}.partial")
        if scratch is not None:
            scratch.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as kept, open(scratch or os.devnull, "wb") as result:
            kept.write(f"$ python -m launch {' '.join(words)}\n".encode())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launch", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if scratch is None else result,
                stderr=subprocess.STDOUT if scratch is None else subprocess.PIPE,
                pass_fds=(self._lock.fileno(),),
                start_new_session=True,  # Ctrl-C comes from here, once
            )
            if self.signal is not None:  # it came before there was a process to tell
                self._process.send_signal(self.signal)
            stream = self._process.stdout if scratch is None else self._process.stderr
            assert stream is not None
            for line in stream:
                kept.write(line)
                kept.flush()
                self._show.write(line.decode(errors="replace"))
                self._show.flush()
            status = self._process.wait()
            self._process = None
        if scratch is not None and stdout is not None and status == 0:
            scratch.replace(stdout)
        return 128 - status if status < 0 else status

    def say(self, line: str) -> None:
        """Shows a line of the recipe's own."""
        self._show.write(f"{line}\n")
        self._show.flush()

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Passes signals on to the command that runs; what began last is waited for."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


@contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """Holds a recipe's directory.

    Raises:
      UserError: another recipe, or a command that it left behind, still works there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}; choose another output") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{path.parent}: another recipe works here, or a command of one; wait for it") from error
        yield file
