"""Files that strangers made, and directories that appear whole or not at all."""

import collections
import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tlite_jax.errors import UserError

MAX_JSON_BYTES = 64 << 20  # Gemma's tokenizer.json, among the largest, has 33 MB
MAX_CONTAINERS = 4_000_000  # objects and arrays: 64 MB of "[]," would take 1.5 GB of memory
_LFS_POINTER = b"version "  # https://git-lfs.github.com/spec/v1; no JSON, GGUF or safetensors file begins so
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: missing, too large, not UTF-8 JSON, not an object, or a key given twice.
    """
    return parse_json(read_bounded(path, max_bytes), str(path))


def read_bounded(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Reads a file whole.

    Raises:
      UserError: missing or too large.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size} bytes; such a file has at most {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def parse_json(content: bytes, origin: str) -> dict[str, Any]:
    """Parses a JSON object whose keys must differ; `origin` names it in errors.

    Raises:
      UserError: not UTF-8 JSON of an object, a key given twice, text that UTF-8 cannot hold, too many parts.
    """
    refuse_pointer(content, origin)
    parts = content.count(b"[") + content.count(b"{")
    if parts > MAX_CONTAINERS:
        raise UserError(f"{origin}: up to {parts} objects and arrays; more than {MAX_CONTAINERS} are refused")

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            repeated = sorted(name for name, count in counts.items() if count > 1)
            raise UserError(f"{origin}: given twice: {listed(repeated)}")
        return values

    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=without_repeats)
        if _HALF_CHARACTER.search(content):
            json.dumps(values, ensure_ascii=False).encode()  # fails where a half has no other
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{origin}: expected a JSON object, found {type(values).__name__}")
    return values


def refuse_pointer(content: bytes, origin: str) -> None:
    """Raises UserError for what Git leaves in place of a large file that was not fetched."""
    if content.startswith(_LFS_POINTER):
        raise UserError(f"{origin}: a Git LFS pointer, not the file; fetch the file with `git lfs pull`")


def shown(name: str) -> str:
    """A name from a file, fit for one line of an error."""
    return name if name.isprintable() and len(name) <= 200 else repr(name[:200])


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Names from a file, fit for one line of an error, however many."""
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(map(shown, every[:limit])) + more


def contained(directory: Path, name: str, origin: str) -> Path:
    """Returns the regular file `name` in `directory`, whoever chose the name.

    Symbolic links may lead elsewhere within the directory, or to the blobs of a Hugging Face cache that it, or the
    directory above it, is a snapshot of.

    Raises:
      UserError: not a bare file name, not there, or a link that leads outside.
    """
    if name in ("", ".", "..") or name != os.path.basename(name) or "\\" in name or "\0" in name:
        raise UserError(f"{origin}: {shown(name)!r} is not a bare file name; files lie beside the index")
    path = directory / name
    if not path.is_file():
        raise UserError(f"{origin}: {name!r} is missing in {directory}")
    roots = [directory.resolve()]
    snapshots = (directory.absolute(), directory.absolute().parent)
    roots += [place.parent.parent.resolve() / "blobs" for place in snapshots if place.parent.name == "snapshots"]
    found = path.resolve()
    if not any(found.is_relative_to(root) for root in roots):
        raise UserError(f"{origin}: {name!r} is a link out of {directory}; put the file itself there")
    return path


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `destination` that takes its place when the block ends without an error.

    What the block wrote is flushed to the disk before the renaming, so that an interrupted one never looks whole; a
    failed one is removed, one of a killed process when the next begins.

    Raises:
      UserError: `destination` exists and is not an empty directory, or cannot be written.
    """
    refuse_occupied(destination)
    destination = Path(os.path.abspath(destination))
    with _temporary(destination, is_directory=True) as temporary:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _flush(os.path.join(folder, name))
            _flush(folder)
        os.chmod(temporary, 0o777 & ~_umask())
        os.rename(temporary, destination)
        _flush(destination.parent)


@contextlib.contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """Yields the path of a temporary file beside `destination` that takes its place when the block ends without error.

    Its content is flushed to the disk before the renaming; after an error it is removed, after a kill when the next
    begins.

    Raises:
      UserError: `destination` exists or cannot be written.
    """
    if os.path.lexists(destination):
        raise UserError(f"{destination} exists; remove it or choose another destination")
    destination = Path(os.path.abspath(destination))
    with _temporary(destination, is_directory=False) as temporary:
        yield temporary
        _flush(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.rename(temporary, destination)
        _flush(destination.parent)


@contextlib.contextmanager
def _temporary(destination: Path, *, is_directory: bool) -> Iterator[Path]:
    """Makes `.NAME.partial-*` beside a destination, locked while this process lives, and removes it at the end."""
    prefix = f".{destination.name}.partial-"
    descriptor = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination.parent, prefix)
        while descriptor is None:
            temporary = _made(destination.parent, prefix, is_directory)
            try:
                descriptor = _lock(temporary)  # None: another process took it for abandoned in between
            except OSError:
                break  # no locks here, and so nobody removes what is locked
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error
    try:
        yield temporary
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        _remove(temporary)
        if descriptor is not None:
            os.close(descriptor)


def _made(directory: Path, prefix: str, is_directory: bool) -> Path:
    if is_directory:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=directory)
    os.close(descriptor)
    return Path(name)


def _remove_abandoned(directory: Path, prefix: str) -> None:
    """Removes what killed processes left: what nobody holds a lock on."""
    for left in directory.iterdir():
        if not left.name.startswith(prefix):
            continue
        with contextlib.suppress(OSError):  # no locks here: somebody may be at work on it
            if (descriptor := _lock(left)) is not None:
                _remove(left)
                os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Returns an open descriptor that keeps others off `path`; None where another has it or it is gone.

    Raises:
      OSError: the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    locked = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = os.path.lexists(path)
    except BlockingIOError:
        pass
    finally:
        if not locked:
            os.close(descriptor)
    return descriptor if locked else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_occupied(destination: Path) -> None:
    """Raises UserError unless `destination` is free: absent, or an empty directory."""
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise UserError(f"{destination} exists and is not a directory; choose another destination")
    if any(destination.iterdir()):
        raise UserError(f"{destination} exists and is not empty; choose another destination or remove it")


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
