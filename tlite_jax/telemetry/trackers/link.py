"""The process that speaks to a tracker, as the training process sees it: a question, and an answer in time or none.

A tracker's library starts threads, handlers and processes of its own, waits for the network when Python ends, and
takes seconds to load. In a process of its own it can do all of that, and be killed.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_PACKAGES = str(Path(__file__).resolve().parent.parent.parent.parent)


class LinkError(Exception):
    """Why there was no answer, or that it was one of regret.

    Attributes:
      refused: the tracker will not have what it was given, however often it is tried.
      broken: the process is of no more use.
    """

    def __init__(self, message: str, *, refused: bool = False, broken: bool = False):
        super().__init__(message)
        self.refused, self.broken = refused, broken


class Link:
    """A running process for one tracker.

    Args:
      command: that starts it.
    """

    def __init__(self, command: list[str]):
        path = os.pathsep.join(filter(None, [_PACKAGES, os.environ.get("PYTHONPATH")]))
        # A session of its own: Ctrl-C is for the trainer, and all that the library starts can be killed at once.
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        self._killed = False

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the answer to it.

        Raises:
          LinkError: an answer that tells of an error, or none within `seconds`.
        """
        deadline = time.monotonic() + seconds
        try:
            self._send(json.dumps(request).encode() + b"\n", deadline)
            answer: dict[str, Any] = json.loads(self._receive(deadline))
        except (OSError, ValueError) as error:
            raise LinkError(self._ended(), broken=True) from error
        if "error" in answer:
            raise LinkError(answer["error"], refused=answer["refused"])
        return answer

    def kill(self) -> None:
        """Ends the process and what it has started, at once; from any thread, more than once."""
        if not self._killed:
            self._killed = True
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Ends the process and lets go of the pipes; not while another thread asks."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            self._wait(self._to, select.POLLOUT, deadline)
            with suppress(BlockingIOError):
                data = data[os.write(self._to, data) :]

    def _receive(self, deadline: float) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            self._wait(self._from, select.POLLIN, deadline)
            part = os.read(self._from, 1 << 16)
            if not part:
                raise LinkError(self._ended(), broken=True)
            line += part
        return line

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise LinkError("no answer in time", broken=True)

    def _ended(self) -> str:
        if self._killed:
            return "no answer in time"
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1.0)
            return f"its process ended with status {status}"
        return "its process does not listen"


def command(tracker: str) -> list[str]:
    """Starts the process of a tracker: "wandb" or "mlflow"."""
    return [sys.executable, "-m", "tlite_jax.telemetry.trackers.process", tracker]
