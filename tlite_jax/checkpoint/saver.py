"""Saving a run's checkpoints while it trains: in the background, sealed, as many as asked for.

A save that fails (a full disk) costs the run nothing but that checkpoint: what it wrote is deleted, its reason is told
once, and the next save is a new try. Of several processes all come to the same end: when one fails, the others are told
so while they write, and process 0 alone says that a checkpoint is whole.

With a local tier, a checkpoint is written to the local disks first and copied from there, so that a slow file system is
waited for by no array in memory. When the local disks cannot take it, it goes to the run's directory at once.
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from pathlib import Path

import jax

from tlite_jax.checkpoint import orbax_writer
from tlite_jax.checkpoint.copy import publish_copy
from tlite_jax.checkpoint.local import LocalTier
from tlite_jax.checkpoint.peers import PATIENCE_SECONDS, alone, new_talk, reason_of
from tlite_jax.checkpoint.seal import PARTIAL, PINNED, publish
from tlite_jax.checkpoint.stored import Meta, steps_on_disk
from tlite_jax.config import CheckpointConfig
from tlite_jax.train.state import TrainState

_DELETING = ".deleting"
_SLOWEST_DISK_SECONDS = 60.0  # that a save waits for the one before on the local disks
_ROOM = 1.02  # of a state's bytes: meta, directories and what a file system takes for itself


class Saver:
    """Saves a run's checkpoints in the background and keeps the ones that its config asks for.

    Args:
      run: directory.
      config: how many to keep.
      kept: which of the given steps are to be kept besides, asked for before any is deleted.
      local: saves on the local disks; None: there are none.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        kept: Callable[[Collection[int]], Collection[int]],
        local: LocalTier | None = None,
    ):
        self._directory = run.absolute() / "checkpoints"
        self._run, self._config, self._kept, self._local = run, config, kept, local
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures: list[str] = []
        self.failed_step: int | None = None  # that the last save came to nothing at
        self._tries = 0
        self._delete_leftovers()
        self._talk = alone()
        self._checkpointer = orbax_writer.together(self._meet)

    def save(self, state: TrainState, meta: Meta) -> None:
        """Starts saving; returns when the state's arrays may be donated. What goes wrong is told by `failures`."""
        self.wait()
        self._tries += 1
        self._talk, self.failed_step = new_talk(f"save {meta.step}", "-save"), None
        try:
            if shortage := self._make_room(state):
                self.save_locally(state, meta)
                self._note(meta.step, shortage)
                return
            part = self._begun_locally(state, meta)
            if part is None:
                self._checkpointer.save(self._partial(meta.step), args=orbax_writer.items(state, meta))
        except Exception as error:
            self._talk.fail(error)
            self._give_up(meta.step, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(meta.step, part), name=str(meta.step))
        self._thread.start()

    def save_locally(self, state: TrainState, meta: Meta) -> None:
        """The same on the local disks only, if there are any."""
        if self._local is None:
            return
        busy = self._thread is not None and self._local.copied is None and self._thread.is_alive()
        if why := self._local.save(state, meta, "another save is under way" if busy else ""):
            self._failures.append(f"checkpoint {meta.step} was not saved locally: {why}")

    def _begun_locally(self, state: TrainState, meta: Meta) -> Future[Path] | None:
        """The part that is being saved and will be copied; None: the local disks do not take it."""
        if self._local is None:
            return None
        self._local.wait(_SLOWEST_DISK_SECONDS)
        if why := self._local.save(state, meta, "" if self._local.is_healthy else "the last save there has failed"):
            self._failures.append(f"checkpoint {meta.step} is saved without the local disks: {why}")
            return None
        self._local.copied = meta.step
        return self._local.last

    def run_is_done(self) -> None:
        """Deletes what only an interrupted run needs: its local checkpoints."""
        if self._local is not None:
            self._local.remove()

    def failures(self) -> list[str]:
        """Why saves came to nothing, as far as it is known by now without waiting; each is told once."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        if self._local is not None:
            self._failures = self._local.failures() + self._failures
        told, self._failures = self._failures, []
        return told

    def wait(self) -> None:
        """Waits for the save under way."""
        if self._thread is None:
            return
        self._thread.join()
        if self._local is not None:
            self._local.copied = None
        step, error = int(self._thread.name), self._error
        self._thread = self._error = None
        if error is not None:
            self._give_up(step, error)

    def close(self) -> None:
        """Waits for the save under way and deletes what need not be kept."""
        self.wait()
        self._checkpointer.close()
        self._delete_leftovers()
        self._delete_old()
        if self._local is not None:
            self._local.close()

    def _finish(self, step: int, part: Future[Path] | None) -> None:
        """In a thread of its own: until a checkpoint is whole, sealed and named."""
        final = self._directory / str(step)
        try:
            if part is None:
                self._checkpointer.wait_until_finished()
                publish(self._partial(step), final, self._talk)
            else:
                publish_copy(part.result(PATIENCE_SECONDS), self._partial(step), final, self._talk)
        except Exception as error:
            self._talk.fail(error)
            self._error = error

    def _meet(self, topic: str) -> None:
        self._talk.meet(topic)

    def _partial(self, step: int) -> Path:
        # Not the same for a second try: Orbax's threads may write on for a while after a save has failed.
        return self._directory / f"{step}.{self._tries}{PARTIAL}"

    def _give_up(self, step: int, error: Exception) -> None:
        """Gives back the disk that a failed save holds."""
        with contextlib.suppress(Exception):  # it may know of the same failure
            self._checkpointer.close()
        self._checkpointer = orbax_writer.together(self._meet)
        self._delete_leftovers()
        self._note(step, reason_of(error))

    def _note(self, step: int, reason: str) -> None:
        self.failed_step = step
        self._failures.append(f"checkpoint {step} was not saved: {reason}")

    def _make_room(self, state: TrainState) -> str:
        """Deletes what need not be kept; returns why there is no room for a state, "" when there is."""
        needed = int(_ROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))

        def delete(words: list[str]) -> str:  # all processes are here: none of them is writing
            self._directory.mkdir(parents=True, exist_ok=True)
            self._delete_leftovers()
            self._delete_old()
            return ""

        def shortage(words: list[str]) -> str:
            free = min(map(int, words))
            if free >= needed:
                return ""
            return f"it takes {needed / 1e9:,.3g} GB, and {self._directory} has {free / 1e9:,.3g} GB left"

        self._talk.meet("cleared", decide=delete)
        return self._talk.meet("room", str(shutil.disk_usage(self._directory).free), shortage)

    def _delete_old(self) -> None:
        if jax.process_index() != 0:
            return
        every, steps = self._config.keep_every, steps_on_disk(self._run)
        kept = self._kept(steps)
        for step in steps[: -self._config.keep_latest]:
            directory = self._directory / str(step)
            if step not in kept and not (every and step % every == 0) and not (directory / PINNED).exists():
                _delete(directory)

    def _delete_leftovers(self) -> None:
        """Gives back the disk that half-saved and half-deleted checkpoints hold."""
        if jax.process_index() != 0:
            return
        for pattern in (f"*{_DELETING}", f"*{PARTIAL}", "*.orbax-checkpoint-tmp*"):
            for leftover in self._directory.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def _delete(directory: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a half-deleted one is never taken for whole."""
    doomed = directory.with_name(f"{directory.name}{_DELETING}")
    directory.rename(doomed)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def saver(
    run: Path,
    config: CheckpointConfig,
    kept: Callable[[Collection[int]], Collection[int]] = lambda steps: (),
    local: LocalTier | None = None,
) -> Iterator[Saver]:
    """A Saver that is closed, its last save finished, on the way out."""
    result = Saver(run, config, kept, local)
    try:
        yield result
    finally:
        result.close()
