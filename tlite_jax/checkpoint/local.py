"""Saving on the local disks: each process its part, often, and from there the durable checkpoint is made.

All processes save a step or none does; each seals its own part. What goes wrong costs the run that part only.
"""

import contextlib
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax

from tlite_jax.checkpoint import orbax_writer
from tlite_jax.checkpoint.parts import drop, drop_after, steps_of
from tlite_jax.checkpoint.peers import Talk, alone, new_talk, reason_of
from tlite_jax.checkpoint.seal import PARTIAL, publish
from tlite_jax.checkpoint.stored import Meta
from tlite_jax.train.state import TrainState

KEPT = 2  # latest steps, beside the one that is being written
_ROOM = 1.02


class LocalTier:
    """Saves this process's parts in the background.

    Args:
      parts: directory; see `checkpoint.parts`.
      start_step: that the run goes on from; parts of later steps are deleted.
    """

    def __init__(self, parts: Path, start_step: int) -> None:
        self._parts = parts
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="local")
        self._step = 0
        self._failures: list[str] = []
        self.is_healthy = True  # as far as the last save tells
        self.last: Future[Path] | None = None  # the last save: the part when it is whole
        self.copied: int | None = None  # the step that is being copied
        self._checkpointer = orbax_writer.apart()
        drop_after(parts, start_step)
        self._delete_leftovers()

    def wait(self, seconds: float) -> None:
        """For the save under way, so long at most."""
        if self.last is not None:
            wait([self.last], seconds)
        self._collect()

    def save(self, state: TrainState, meta: Meta, hindrance: str = "") -> str:
        """Starts saving; returns when the state's arrays may be donated.

        Args:
          state, meta: what.
          hindrance: why this process should not.

        Returns:
          "" or why none of the processes saves.
        """
        self._collect()
        try:
            ready = new_talk(f"local {meta.step}").meet("ready", hindrance or self._hindrance(state), _reasons)
        except Exception as error:
            return reason_of(error)
        if ready:
            return ready
        self._step, self.last = meta.step, Future()
        talk = new_talk(f"local {meta.step}", "-local")
        try:
            drop(self._parts / str(meta.step))  # of a save that the run's directory could not take
            self._checkpointer.save(self._partial, args=orbax_writer.items(state, meta))
            self.last = self._pool.submit(self._finish, meta.step, talk)
        except Exception as error:
            talk.fail(error)
            self.last.set_exception(error)
        return ""

    def failures(self) -> list[str]:
        """Why saves came to nothing, as far as it is known by now without waiting; each is told once."""
        self._collect()
        told, self._failures = self._failures, []
        return told

    def close(self) -> None:
        """Waits for the save under way."""
        self._pool.shutdown()
        self._collect()
        with contextlib.suppress(Exception):  # of a save that has failed
            self._checkpointer.close()

    def remove(self) -> None:
        """Deletes the parts of a run that is done."""
        self._pool.shutdown()
        shutil.rmtree(self._parts, ignore_errors=True)
        with contextlib.suppress(OSError):  # other processes' parts
            self._parts.parent.rmdir()

    @property
    def _partial(self) -> Path:
        return self._parts / f"{self._step}{PARTIAL}"

    def _finish(self, step: int, talk: Talk) -> Path:
        """In a thread of its own: until the parts of all processes are whole, sealed and named."""
        part = self._parts / str(step)
        try:
            self._checkpointer.wait_until_finished()
            publish(self._partial, part, alone())
            talk.meet("whole")
        except Exception as error:
            talk.fail(error)
            raise
        return part

    def _collect(self) -> None:
        """Takes notice of the last save's end."""
        if self.last is None or not self.last.done():
            return
        error, self.last = self.last.exception(), None
        self.is_healthy = error is None
        if isinstance(error, Exception):
            self._failures.append(f"checkpoint {self._step} was not saved locally: {reason_of(error)}")
            with contextlib.suppress(Exception):  # it may know of the same failure
                self._checkpointer.close()
            self._checkpointer = orbax_writer.apart()
            drop(self._parts / str(self._step))  # whole here perhaps, but not for all
            self._delete_leftovers()

    def _hindrance(self, state: TrainState) -> str:
        if self.last is not None:
            return "the one before is still being written"
        needed = int(_ROOM * sum(map(_own_bytes, jax.tree.leaves(state))))
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            self._delete_leftovers()  # of a save that failed: Orbax's threads may write on for a while
            self._delete_old()
            free = shutil.disk_usage(self._parts).free
        except OSError as error:
            return reason_of(error)
        if free >= needed:
            return ""
        return f"it takes {needed / 1e9:,.3g} GB, and {self._parts} has {free / 1e9:,.3g} GB left"

    def _delete_old(self) -> None:
        for step in steps_of(self._parts)[:-KEPT]:
            if step != self.copied:
                drop(self._parts / str(step))

    def _delete_leftovers(self) -> None:
        """Gives back the disk that half-saved and half-deleted parts hold."""
        for pattern in ("*.deleting", f"*{PARTIAL}", "*.orbax-checkpoint-tmp*"):
            for leftover in self._parts.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def _reasons(words: list[str]) -> str:
    named = [f"process {process}: {word}" if len(words) > 1 else word for process, word in enumerate(words) if word]
    return "; ".join(named[:4]) + (" ..." if len(named) > 4 else "")


def _own_bytes(array: jax.Array) -> int:
    """Of the shards in this process, each once: it writes no more."""
    return sum({str(shard.index): shard.data.nbytes for shard in array.addressable_shards}.values())
