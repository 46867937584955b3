"""The seal of a checkpoint: sizes and hashes of all its files, on the disk before their manifest is, which comes last.

STEP/manifest.json lists every other file. A file system may lose what was not fsynced, and a disk may change what it
holds: Orbax promises nothing against either. XXH3-128 guards against accidents, at memory speed; against somebody who
means harm it is no signature.
"""

import json
import os
import re
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from tlite_jax.checkpoint.peers import Talk
from tlite_jax.checkpoint.reader import Target
from tlite_jax.data.files import read_json, sync, write_json
from tlite_jax.errors import UserError
from tlite_jax.verification import Damage

MANIFEST = "manifest.json"
PINNED = "PINNED"
PARTIAL = ".partial"  # of a directory that is not sealed yet
_PARTIAL_MANIFEST = f".{MANIFEST}.partial"
_ALGORITHM = "xxh3_128"
_CHUNK = 4 << 20
_THREADS = 8
_OF_PROCESS = re.compile(r"/(?:ocdbt\.)?process_(\d+)(?:/|$)")

Entry = dict[str, Any]
Report = Callable[[int], None]


class UnsealedError(Exception):
    """The manifest is missing or is not what was written; the message says which."""


def seal(
    directory: Path,
    talk: Talk,
    then: Callable[[], None] = lambda: None,
    expected: Mapping[str, Entry] = types.MappingProxyType({}),
    written: Mapping[str, Entry] = types.MappingProxyType({}),
) -> None:
    """Makes a directory durable and verifiable; its manifest is written last.

    Each process brings to the disk and hashes the files that it has written, which are in its own memory still.

    Args:
      directory: all its files are complete. The name of the directory itself is the caller's to make durable.
      talk: of the processes that have written it.
      then: called in process 0 when it is sealed, before any process returns.
      expected: what is known of files that this process has copied.
      written: files of this process that are on the disk and hashed already.

    Raises:
      PeerError: another process could not do its part; nothing is sealed then.
      OSError: so could this one, or a copy is not what it is a copy of.
    """

    def finish(words: list[str]) -> str:
        entries = {name: entry for word in words for name, entry in json.loads(word).items()}
        unknown = [name for name in list_files(directory) if name not in entries]
        write_manifest(directory, {**entries, **hash_files(directory, unknown)})
        then()
        return ""

    names = [name for name in list_files(directory) if (writer_of(name) or 0) == talk.process]
    own = {**written, **hash_files(directory, [name for name in names if name not in written])}
    for name in own.keys() & expected.keys():
        if own[name] != expected[name]:
            raise OSError(f"{directory / name} is not what it was copied from")
    talk.meet("sealed", json.dumps(own), finish)


def publish(
    partial: Path,
    final: Path,
    talk: Talk,
    expected: Mapping[str, Entry] = types.MappingProxyType({}),
    written: Mapping[str, Entry] = types.MappingProxyType({}),
) -> None:
    """Seals a checkpoint that is written, each process what it has written, and gives it its name."""

    def give_name() -> None:
        partial.rename(final)
        sync(final.parent)

    seal(partial, talk, give_name, expected, written)


def writer_of(name: str) -> int | None:
    """The process that has written a file, if Orbax says so in its path."""
    found = _OF_PROCESS.search(name)
    return int(found[1]) if found else None


def list_files(directory: Path) -> dict[str, int]:
    """Relative name -> bytes of every file below a directory but its manifest and its pin."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (MANIFEST, _PARTIAL_MANIFEST, PINNED):
            found[name] = path.stat().st_size
    return found


def share(sizes: Mapping[str, int], number: int, count: int) -> list[str]:
    """The files that process `number` of `count` reads; all find the same split.

    Those that it has written, which are mostly those that it needs; where others have written them, about as many bytes
    as any other process.
    """
    if len({writer for name in sizes if (writer := writer_of(name)) is not None}) == count:
        return sorted(name for name in sizes if (writer_of(name) or 0) == number)
    loads, mine = [0] * count, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        to = loads.index(min(loads))
        loads[to] += sizes[name] + 1  # a file costs something, however small
        if to == number:
            mine.append(name)
    return mine


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Puts files on the disk and hashes them, both at once; returns {name: {bytes, hash}}."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        synced = [pool.submit(sync, directory / name) for name in names]
        hashed = list(pool.map(lambda name: _entry(directory / name), names))
        for outcome in synced:
            outcome.result()
    return dict(zip(names, hashed, strict=True))


def write_hashed(path: Path, pieces: Iterable[memoryview]) -> Entry:
    """Writes a new file, hashing each piece while the processor's cache has it; returns its entry.

    The file is on the disk then, and no more in the page cache: one that grows by all that is written costs more than
    the writing, where memory has to be found for it.
    """
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            hasher.update(piece)
            size += len(piece)
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": size, "hash": hasher.hexdigest()}


def write_manifest(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Seals a directory whose files are on the disk: their names first, then the manifest."""
    for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory):
        sync(path)
    write_json(directory / MANIFEST, {"algorithm": _ALGORITHM, "files": dict(sorted(entries.items()))})


def seal_alone(directory: Path) -> None:
    """Makes a directory that this process has written durable and verifiable."""
    write_manifest(directory, hash_files(directory, list_files(directory)))


def read_manifest(directory: Path) -> dict[str, Entry]:
    """The entries of a sealed directory, by name.

    Raises:
      UnsealedError: there is no manifest, or not the one that was written.
    """
    if not (directory / MANIFEST).exists():
        raise UnsealedError("missing")
    try:
        values = read_json(directory / MANIFEST)
    except UserError as error:
        raise UnsealedError("is not what was written") from error
    if values.get("algorithm") != _ALGORITHM:
        raise UnsealedError(f"hashes with {values.get('algorithm')}, this version with {_ALGORITHM}")
    for name in values["files"]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UnsealedError(f"names a file elsewhere: {name!r}")
    return values["files"]


def check_files(
    directory: Path,
    entries: Mapping[str, Entry],
    report: Report = lambda size: None,
    targets: Mapping[str, Sequence[Target]] = types.MappingProxyType({}),
) -> list[Damage]:
    """Reads files whole, several at once, and compares them with their entries.

    Args:
      directory: of a checkpoint.
      entries: of its manifest.
      report: called with the bytes of each piece that was read.
      targets: by name, where parts of a file belong in memory: they are read into it.

    Returns:
      What differs, by name.
    """

    def check(name: str) -> Damage | None:
        wanted = entries[name]
        try:
            size = (directory / name).stat().st_size
            if size != wanted["bytes"]:
                first = min(size, wanted["bytes"])
                problem = f"{size:,} bytes instead of {wanted['bytes']:,}"
                return Damage(name, problem, first, abs(size - wanted["bytes"]))
            if _entry(directory / name, report, targets.get(name, ()))["hash"] != wanted["hash"]:
                return Damage(name, "its bytes are not those that were written", 0, size)
        except FileNotFoundError:
            return Damage(name, "missing")
        except OSError as error:
            return Damage(name, f"cannot be read: {error.strerror}")
        return None

    largest_first = sorted(entries, key=lambda name: -entries[name]["bytes"])
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [damage for damage in pool.map(check, largest_first) if damage is not None]
    return sorted(found, key=lambda damage: damage.file)


def strangers(directory: Path, entries: Collection[str]) -> list[str]:
    """Files there that the manifest does not know: none of them is read."""
    return [name for name in list_files(directory) if name not in entries]


def _entry(path: Path, report: Report = lambda size: None, targets: Sequence[Target] = ()) -> Entry:
    """Reads a file once, from its begin to its end: what targets want into them."""
    hasher, position, scratch = xxhash.xxh3_128(), 0, memoryview(bytearray(_CHUNK))
    wanted = deque(sorted(targets, key=lambda target: target.offset))
    with path.open("rb", buffering=0) as file:
        while True:
            while wanted and wanted[0].offset + len(wanted[0].memory) <= position:
                wanted.popleft()
            view = scratch
            if wanted and wanted[0].offset <= position:
                view = wanted[0].memory[position - wanted[0].offset :]
            elif wanted:
                view = scratch[: wanted[0].offset - position]
            count = file.readinto(view[:_CHUNK])
            if not count:
                return {"bytes": position, "hash": hasher.hexdigest()}
            hasher.update(view[:count])
            position += count
            report(count)
