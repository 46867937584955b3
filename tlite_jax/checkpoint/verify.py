"""Is a checkpoint as it was written? Asked before a run goes on from one, and by `launch verify`."""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from tlite_jax.checkpoint.peers import Talk, new_talk
from tlite_jax.checkpoint.seal import MANIFEST, Entry, UnsealedError, check_files, read_manifest, share, strangers
from tlite_jax.checkpoint.state import StateReading
from tlite_jax.checkpoint.stored import TOKENIZER_DIRECTORY, Checkpoint, is_step, steps_on_disk
from tlite_jax.errors import UserError
from tlite_jax.verification import Damage, Progress, Verification

_NAMED = 100  # damages that a process tells the others of


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is one step of a run, whole or not."""
    return path.is_dir() and path.parent.name == "checkpoints" and is_step(path.name)


def is_run(path: Path) -> bool:
    """Whether a directory holds checkpoints."""
    return bool(steps_on_disk(path))


def verify_checkpoint(path: Path, progress: Progress | None = None) -> Verification:
    """Reads every file of one step and compares it with the step's manifest."""
    return _verify("checkpoint", path, [path], progress)


def verify_run(path: Path, progress: Progress | None = None) -> Verification:
    """Reads every file of a run's tokenizer and of all its steps and compares it with their manifests."""
    found = _verify("run", path, [path / "checkpoints" / str(step) for step in steps_on_disk(path)], progress)
    prefix = f"{TOKENIZER_DIRECTORY}/"
    damages = tuple(replace(damage, file=prefix + damage.file) for damage in tokenizer_damages(path))
    directory = path / TOKENIZER_DIRECTORY
    old = () if is_sealed(directory) or not directory.is_dir() else (f"{prefix}* (written without a manifest)",)
    return replace(found, damages=found.damages + damages, unchecked=(*found.unchecked, *old))


def tokenizer_damages(run: Path) -> list[Damage]:
    """What is wrong with a run's tokenizer; nothing is known of one that has no manifest."""
    directory = run / TOKENIZER_DIRECTORY
    if not is_sealed(directory):
        return []
    try:
        return check_files(directory, read_manifest(directory))
    except UnsealedError as error:
        return [Damage(MANIFEST, str(error))]


def is_sealed(directory: Path) -> bool:
    """Whether a manifest was written with a directory."""
    return (directory / MANIFEST).exists()


def _verify(kind: str, path: Path, directories: Collection[Path], progress: Progress | None) -> Verification:
    damages: list[Damage] = []
    manifests: dict[Path, dict[str, Entry]] = {}
    unchecked: list[str] = []
    for directory in directories:
        prefix = "" if directory == path else f"{directory.relative_to(path).as_posix()}/"
        try:
            manifests[directory] = read_manifest(directory)
            unchecked += [prefix + name for name in strangers(directory, manifests[directory])]
        except UnsealedError as error:
            if _is_older(directory):
                unchecked.append(f"{prefix or './'}* (saved by a version without manifests)")
            else:
                damages.append(Damage(prefix + MANIFEST, str(error)))
    done, total = 0, sum(entry["bytes"] for entries in manifests.values() for entry in entries.values())

    for directory, entries in manifests.items():
        prefix = "" if directory == path else f"{directory.relative_to(path).as_posix()}/"

        def report(size: int, prefix: str = prefix) -> None:
            nonlocal done
            done += size  # of several threads: for a bar
            if progress is not None:
                progress(prefix or "files", done, total)

        damages += [
            Damage(prefix + found.file, found.problem, found.offset, found.bytes)
            for found in check_files(directory, entries, report)
        ]
    files = sum(map(len, manifests.values()))
    checked = f"XXH3-128 of each file, in the {MANIFEST} of {len(manifests)} of {len(directories)} steps"
    return Verification(kind, path, files, total, checked, tuple(damages), tuple(unchecked))


def damages_of(
    directory: Path,
    items: Collection[str] = (),
    reading: StateReading | None = None,
    report: Callable[[int], None] = lambda size: None,
    *,
    is_part: bool = False,
) -> list[Damage]:
    """What is wrong with a step, or with some of its items: params, optimizer, meta.

    All processes call it; each reads a share, and all get what any has found.

    Args:
      directory: the step.
      items: of it; none: all.
      reading: what is read is put where this process needs it.
      report: called with the bytes of each piece that was read, in the threads that read; what it raises ends them.
      is_part: the directory is a part of this process's own; the others read theirs.

    Raises:
      PeerError: a process did not come.
    """
    talk = new_talk(f"verify {directory.name}")
    found = _damages_of_share(directory, items, None if is_part else talk, reading, report)
    if talk.count == 1:
        return found
    if is_part:
        found = [replace(damage, file=f"process {talk.process}: {damage.file}") for damage in found]

    def unite(words: list[str]) -> str:
        united = dict.fromkeys(Damage(**values) for word in words for values in json.loads(word))
        return json.dumps([asdict(damage) for damage in united])

    word = json.dumps([asdict(damage) for damage in found[:_NAMED]])
    return [Damage(**values) for values in json.loads(talk.meet("verified", word, unite))]


def _damages_of_share(
    directory: Path,
    items: Collection[str],
    talk: Talk | None,
    reading: StateReading | None,
    report: Callable[[int], None],
) -> list[Damage]:
    try:
        entries = read_manifest(directory)
    except UnsealedError as error:
        return [] if _is_older(directory) else [Damage(MANIFEST, str(error))]
    sizes = {name: entry["bytes"] for name, entry in entries.items() if not items or name.split("/")[0] in items}
    names = sizes if talk is None else share(sizes, talk.process, talk.count)
    mine = {name: entries[name] for name in names}
    if reading is None:
        return check_files(directory, mine, report)
    targets = reading.targets()
    reading.filled = frozenset(targets.keys() & mine.keys())
    return check_files(directory, mine, report, targets)


def require_intact(
    checkpoint: Checkpoint, items: Collection[str] = (), report: Callable[[int], None] = lambda size: None
) -> None:
    """Raises UserError, with what is wrong and where, unless a checkpoint (or these items) is as it was written.

    So must the tokenizer be that goes with it.
    """
    if found := tokenizer_damages(checkpoint.run):
        raise UserError(
            f"{checkpoint.tokenizer_dir} is damaged: {found[0]}{others(found)}; restore it from where it was copied, "
            f"or delete its {MANIFEST} if you have changed it"
        )
    if found := damages_of(checkpoint.path, items, report=report):
        raise UserError(
            f"{checkpoint.path} is damaged: {found[0]}{others(found)}; restore it from a copy, or name another step"
        )


@contextlib.contextmanager
def intact_meanwhile(checkpoint: Checkpoint, items: Collection[str]) -> Iterator[Callable[[], None]]:
    """Verifies these items while the block reads them; what one reads from the disk the other finds in memory.

    Yields:
      A function that waits for the verification, and raises UserError as `require_intact` does. The block calls it
      before it publishes what it has made. An error of the block gives way to that of a damaged checkpoint.
    """
    ended = threading.Event()

    def stop_when_ended(size: int) -> None:
        if ended.is_set():
            raise InterruptedError("nobody waits for this verification")

    with ThreadPoolExecutor(1, "verify") as pool:
        verification = pool.submit(require_intact, checkpoint, items, stop_when_ended)
        try:
            yield verification.result
        except Exception:
            verification.result()
            raise
        finally:
            ended.set()


def others(found: list[Damage]) -> str:
    """How many more there are than the one that is told."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _is_older(directory: Path) -> bool:
    """Whether a step says that it was saved when there were no manifests."""
    if (directory / MANIFEST).exists():
        return False
    try:
        return json.loads((directory / "meta" / "metadata").read_bytes())["format_version"] == 1
    except (OSError, ValueError, KeyError, TypeError):
        return False
