"""What the processes of a job tell each other about a checkpoint, so that all of them come to the same end.

Words go through the key-value store of the job's coordinator: from any thread, and no device takes part. Process 0
gathers and decides, the others hear what it says; each waits for a bounded time and is told who did not come.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from tlite_jax.coordinator import store

PATIENCE_SECONDS = 1200.0
_LONGEST_PAUSE = 0.5
_ROOT = "tlite/checkpoint"
_FAILED = "!"


class PeerError(Exception):
    """Another process failed or did not come; the message names it."""


def reason_of(error: Exception) -> str:
    """An error in a line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, PeerError) else f"{type(error).__name__}: {line}"


class Talk:
    """One thing that all processes do together, in steps that each has a topic.

    Args:
      store: of the coordinator: jax's distributed client; None for a process that is alone.
      name: the same in all processes, used once.
      process, count: this one, and how many there are.
      seconds: that the slowest process is waited for at each step.
    """

    def __init__(self, store: Any, name: str, process: int, count: int, seconds: float = PATIENCE_SECONDS):
        self._store, self._name, self.process, self.count, self._seconds = store, name, process, count, seconds

    def meet(self, topic: str, word: str = "", decide: Callable[[list[str]], str] = lambda words: "") -> str:
        """Returns when all processes are here: what process 0 decided, given the word of each.

        Raises:
          PeerError: a process failed or did not come; in all processes.
          Exception: in process 0, what `decide` raised; a PeerError with its reason in the others.
        """
        if self.count == 1:
            return decide([word])
        self._set(f"words/{topic}/{self.process}", word)
        if self.process:
            return self._heard(topic)
        try:
            answer = decide(self._gathered(topic))
        except Exception as error:
            self.fail(error)
            raise
        self._set(f"answers/{topic}", answer)
        return answer

    def fail(self, error: Exception) -> None:
        """Lets the others know that this process does not go on; they raise it wherever they meet next."""
        if self.count == 1:
            return
        named = reason_of(error) if isinstance(error, PeerError) else f"process {self.process}: {reason_of(error)}"
        with contextlib.suppress(Exception):  # without its coordinator the job is over
            self._set(f"failed/{self.process}" if self.process else f"answers/{_FAILED}", named)

    def forget(self) -> None:
        """Frees the store of what was said; for one process, when no other listens any more."""
        self._store.key_value_delete(f"{self._name}/")

    def _gathered(self, topic: str) -> list[str]:
        words: dict[str, str] = {}
        for _ in _looks(self._seconds):
            if failed := self._get("failed/"):
                raise PeerError("; ".join(failed[process] for process in sorted(failed, key=int)))
            words = self._get(f"words/{topic}/")
            if len(words) == self.count:
                return [words[str(process)] for process in range(self.count)]
        raise PeerError(_absent([process for process in range(self.count) if str(process) not in words], self._seconds))

    def _heard(self, topic: str) -> str:
        seconds = 2 * self._seconds  # process 0 may come as late as that, if it waits for another one
        for _ in _looks(seconds):
            answers = self._get("answers/")
            if topic in answers:
                return answers[topic]
            if _FAILED in answers:
                raise PeerError(answers[_FAILED])
        raise PeerError(_absent([0], seconds))

    def _set(self, key: str, value: str) -> None:
        self._store.key_value_set(f"{self._name}/{key}", value, allow_overwrite=True)

    def _get(self, directory: str) -> dict[str, str]:
        prefix = f"{self._name}/{directory}"
        return {key.removeprefix(prefix): value for key, value in self._store.key_value_dir_get(prefix)}


def _absent(processes: Sequence[int], seconds: float) -> str:
    names = ", ".join(map(str, processes[:8])) + (" ..." if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {names} did not come within {seconds:,.0f} s"


def _looks(seconds: float) -> Iterator[None]:
    """Comes up now and then, until the time is over."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while True:
        yield
        if time.monotonic() > deadline:
            return
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def alone() -> Talk:
    """A talk of this process with itself."""
    return Talk(None, "", 0, 1)


class Peers:
    """The processes of this job; gives out talks, one after another, which all must take in the same order."""

    def __init__(self, store: Any, process: int, count: int, line: str = ""):
        self._store, self._process, self._count, self._root = store, process, count, f"{_ROOT}{line}"
        self._talks: list[Talk] = []
        self._taken = 0

    def talk(self, what: str) -> Talk:
        """A new talk about something."""
        self._taken += 1
        result = Talk(self._store, f"{self._root}/{self._taken}/{what}", self._process, self._count)
        if self._count > 1 and self._process == 0:
            self._talks.append(result)
            if len(self._talks) > 2:  # who takes part in the last one has heard the end of the one before
                self._talks.pop(0).forget()
        return result


@functools.cache
def peers(line: str = "") -> Peers:
    """Of this job."""
    return Peers(store(), jax.process_index(), jax.process_count(), line)


def new_talk(what: str, line: str = "") -> Talk:
    """A new talk of this job's processes.

    Args:
      what: it is about.
      line: talks of different lines may go on at the same time; of one line, each begins when the one before is over.
    """
    return peers(line).talk(what)
