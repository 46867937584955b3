"""Every byte of a directory of buckets against its checksums, and the place of each that differs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from tlite_jax.config import digest
from tlite_jax.data.buckets import MANIFEST, TOKEN, is_bucket, read_store_manifest
from tlite_jax.data.files import read_json
from tlite_jax.errors import UserError
from tlite_jax.verification import Damage, Progress, Verification

CHECKED = "files against the crc32c in their manifests, rows against their own, manifests against their digests"
# What prepare leaves beside the buckets for people; nothing reads it.
_BESIDE = ("quarantine.jsonl", "duplicates.jsonl", ".lock", ".shards")
_READ_BYTES = 1 << 20


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


class _Verifier:
    def __init__(self, directory: Path, progress: Progress) -> None:
        self._directory, self._progress = directory, progress
        self._damages: list[Damage] = []
        self._files = self._bytes = 0
        self._total = sum(path.stat().st_size for path in directory.glob("*/*") if path.is_file())

    def run(self) -> Verification:
        found = sorted(path.name for path in self._directory.iterdir())
        there = [name for name in found if is_bucket(self._directory / name)]
        if MANIFEST not in found:
            raise UserError(f"{self._directory} holds unfinished buckets, without {MANIFEST}: run prepare again")
        manifest = self._manifest(self._directory / MANIFEST)
        if manifest is not None:
            read_store_manifest(self._directory)  # refuses another version
        expected = dict.fromkeys(there) if manifest is None else manifest["buckets"]
        for name, wanted in expected.items():
            self._bucket(self._directory / name, wanted)
        known = {MANIFEST, *_BESIDE, *expected}
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
            path = directory / name
            self._file(path, file, self._row_checksums(path, values) if name == "tokens.bin" else None)

    def _row_checksums(self, path: Path, manifest: dict[str, Any]) -> tuple[int, Sequence[int]]:
        """Bytes of a row, and the rows' checksums as far as they can be read."""
        try:
            data = (path.parent / "rows.bin").read_bytes()
        except OSError:
            data = b""
        return manifest["sequence_length"] * TOKEN.itemsize, np.frombuffer(data[: len(data) // 4 * 4], TOKEN).tolist()

    def _file(self, path: Path, expected: dict[str, int], blocks: tuple[int, Sequence[int]] | None) -> None:
        """Compares size and checksum; where the file has checksums of its blocks, says which of them differ."""
        size = _size(path)
        if size is None:
            self._damage(path, "missing")
            return
        if size != expected["bytes"]:
            first = min(size, expected["bytes"])
            self._damage(path, f"{size} bytes instead of {expected['bytes']}", first, abs(size - expected["bytes"]))
        self._count(path)
        crc, bad = 0, []
        block_bytes, checksums = blocks or (_READ_BYTES, [])
        for number, block in enumerate(_blocks(path, block_bytes)):
            crc = google_crc32c.extend(crc, block)
            if number < len(checksums) and google_crc32c.value(block) != checksums[number]:
                bad.append(number)
            self._progress("verifying", self._bytes, self._total)
        if crc == expected["crc32c"] or size != expected["bytes"]:
            return
        for number in bad:
            self._damage(path, f"row {number} is damaged", number * block_bytes, block_bytes)
        if not bad:
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


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block
