"""Every byte of a directory of buckets against its checksums, and the place of each that differs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from tlite_jax.config import digest
from tlite_jax.data.blocks import BLOCK_BYTES
from tlite_jax.data.bucket_writer import MANIFEST
from tlite_jax.data.buckets import is_bucket, read_store_manifest
from tlite_jax.data.files import read_json
from tlite_jax.data.row_format import ROW, TOKEN
from tlite_jax.errors import UserError
from tlite_jax.verification import Damage, Progress, Verification

CHECKED = "files against the crc32c in their manifests, rows against their own, manifests against their digests"
# What prepare holds while it works.
_PASSING = (".lock", ".shards")


def is_buckets(path: Path) -> bool:
    """Whether a directory holds buckets, told by the names in it."""
    return path.is_dir() and any(is_bucket(child) for child in path.iterdir())


def verify_buckets(directory: Path, progress: Progress | None = None) -> Verification:
    """Reads every file of a directory of buckets.

    Args:
      directory: what `prepare` wrote.
      progress: called with ("verifying", bytes done, bytes in all).

    Returns:
      All damages; a damaged manifest does not hide those of other files.

    Raises:
      UserError: unfinished, or of another format version.
    """
    return _Verifier(directory, progress or (lambda *_: None)).run()


class _Blocks(NamedTuple):
    """The checksums of a file's consecutive blocks; none: the whole file has one."""

    bytes: int
    checksums: list[int]
    name: str = "block"


class _Verifier:
    def __init__(self, directory: Path, progress: Progress) -> None:
        self._directory, self._progress = directory, progress
        self._damages: list[Damage] = []
        self._files = self._bytes = 0
        self._total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())

    def run(self) -> Verification:
        found = sorted(path.name for path in self._directory.iterdir())
        there = [name for name in found if is_bucket(self._directory / name)]
        if MANIFEST not in found:
            raise UserError(f"{self._directory} holds unfinished buckets, without {MANIFEST}: run prepare again")
        manifest = self._manifest(self._directory / MANIFEST)
        if manifest is not None:
            read_store_manifest(self._directory)  # refuses another version
        expected = dict.fromkeys(there) if manifest is None else manifest["buckets"]
        lists = {} if manifest is None else manifest.get("lists", {})  # absent in the first versions
        for name, entry in lists.items():
            self._file(self._directory / name, entry, _Blocks(BLOCK_BYTES, []))
        for name, wanted in expected.items():
            self._bucket(self._directory / name, wanted)
        known = {MANIFEST, *_PASSING, *lists, *expected}
        unchecked = tuple(name for name in found if name not in known)
        damages = tuple(self._damages)
        return Verification("buckets", self._directory, self._files, self._bytes, CHECKED, damages, unchecked)

    def _manifest(self, path: Path) -> dict[str, Any] | None:
        """Reads one that carries its own digest; None when it is damaged or missing, which is noted."""
        try:
            values = read_json(path)
        except UserError as error:
            self._damage(path, str(error).removeprefix(f"{path} is damaged: "), 0, _size(path))
            return None
        self._count(path)
        return values

    def _bucket(self, directory: Path, wanted: str | None) -> None:
        values = self._manifest(directory / MANIFEST)
        if values is None:
            return
        if wanted is not None and digest(values) != wanted:
            self._damage(directory / MANIFEST, "not the one these buckets were made with", 0, _size(directory))
        for name, file in values["files"].items():
            is_tokens = name == "tokens.bin"
            blocks = _row_blocks(directory, values) if is_tokens else _Blocks(BLOCK_BYTES, file.get("blocks", []))
            self._file(directory / name, file, blocks)

    def _file(self, path: Path, expected: dict[str, Any], blocks: "_Blocks") -> None:
        """Compares size and checksum, and says which blocks differ."""
        size = _size(path)
        if size is None:
            self._damage(path, "missing")
            return
        if size != expected["bytes"]:
            first = min(size, expected["bytes"])
            self._damage(path, f"{size} bytes instead of {expected['bytes']}", first, abs(size - expected["bytes"]))
        self._count(path)
        crc, bad = 0, []
        for number, block in enumerate(_read(path, blocks.bytes)):
            crc = google_crc32c.extend(crc, block)
            is_whole = (number + 1) * blocks.bytes <= size or size == expected["bytes"]
            if number < len(blocks.checksums) and is_whole and google_crc32c.value(block) != blocks.checksums[number]:
                bad.append(number)
            self._progress("verifying", self._bytes, self._total)
        if crc == expected["crc32c"]:  # then it is the checksums' file that is damaged, which is compared too
            return
        for number in bad:
            place = number * blocks.bytes
            self._damage(path, f"{blocks.name} {number} is damaged", place, min(blocks.bytes, size - place))
        if not bad and size == expected["bytes"]:
            self._damage(path, "checksum mismatch", 0, size)

    def _count(self, path: Path) -> None:
        self._files += 1
        self._bytes += path.stat().st_size

    def _damage(self, path: Path, problem: str, offset: int | None = None, size: int | None = None) -> None:
        self._damages.append(Damage(str(path.relative_to(self._directory)), problem, offset, size))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _row_blocks(directory: Path, manifest: dict[str, Any]) -> _Blocks:
    """The rows of tokens.bin, with their checksums as far as they can be read."""
    is_old = manifest["format_version"] == 1
    dtype = TOKEN if is_old else ROW
    try:
        data = (directory / "rows.bin").read_bytes()
    except OSError:
        data = b""
    records: Any = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
    checksums = records if is_old else records["tokens_crc32c"]
    return _Blocks(manifest["sequence_length"] * TOKEN.itemsize, checksums.tolist(), "row")


def _read(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block
