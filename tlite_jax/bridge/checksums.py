"""SHA-256 of what an export writes, in the form that `sha256sum -c` reads.

A Hugging Face directory of ours holds SHA256SUMS; a GGUF file has NAME.gguf.sha256 beside it.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from tlite_jax.bridge.files import read_bounded, shown
from tlite_jax.errors import UserError

SUMS_NAME, SUFFIX = "SHA256SUMS", ".sha256"
_MAX_BYTES = 1 << 24
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_CHUNK = 1 << 24
_FLUSHED = 64 << 20  # bytes that are brought to the disk at once


class HashedFile:
    """A new file that is hashed, and brought to the disk, by threads while it is written.

    What is on the disk leaves the page cache, which needs no room for a model that way.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._pool = ThreadPoolExecutor(2)
        self._digest = hashlib.sha256()
        self._unflushed, self._flushing = 0, self._pool.submit(lambda: None)

    def write(self, content: bytes | np.ndarray) -> None:
        """Appends bytes; an array's as they lie in memory."""
        view = memoryview(content) if isinstance(content, bytes) else content.reshape(-1).view(np.uint8).data
        for begin in range(0, len(view), _CHUNK):
            part = view[begin : begin + _CHUNK]
            hashed = self._pool.submit(self._digest.update, part)
            self._unflushed += len(part)
            left = part
            while left:
                left = left[self._file.write(left) :]
            hashed.result()
            if self._unflushed >= _FLUSHED:
                self._flushing.result()
                self._unflushed, self._flushing = 0, self._pool.submit(self._flush)

    def _flush(self) -> None:
        os.fdatasync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def hexdigest(self) -> str:
        """The hash of what was written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._file.close()
        if kind is None:
            self._flushing.result()


def sha256_of(path: Path, report: Callable[[int], None] = lambda size: None) -> str:
    """A file's SHA-256; `report` takes the bytes of each piece."""
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
        report(len(piece))
    return digest.hexdigest()


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of a checksum file: hashes by file name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def read_sums(path: Path) -> dict[str, str]:
    """Hashes by file name.

    Raises:
      UserError: not a checksum file of ours, one that is cut short, or one that names files elsewhere.
    """
    sums: dict[str, str] = {}
    *lines, end = read_bounded(path, _MAX_BYTES).decode("utf-8", errors="replace").split("\n")
    if end or not lines:
        raise UserError(f"{path}: cut short: its last line has no end")
    for line in lines:
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if match is None or "/" in match[2] or match[2] in sums:
            raise UserError(f"{path}: not a list of SHA-256 hashes of files beside it: {shown(line)!r}")
        sums[match[2]] = match[1]
    return sums


def sums_beside(path: Path) -> Path | None:
    """The checksum file that speaks of a GGUF file or a directory, if there is one."""
    candidates = [path / SUMS_NAME] if path.is_dir() else [path.with_name(path.name + SUFFIX), path.parent / SUMS_NAME]
    return next((file for file in candidates if file.is_file()), None)


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                yield piece
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
