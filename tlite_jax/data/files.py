"""Writing that survives a power cut, reading that notices damage."""

import json
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from tlite_jax.config import digest
from tlite_jax.errors import UserError


class ChecksummedFile:
    """A new file whose size and crc32c are known when it is closed, fsynced."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._crc, self._bytes = 0, 0

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        self._file.write(data)
        self._crc = google_crc32c.extend(self._crc, data)
        self._bytes += len(data)

    def close(self) -> dict[str, int]:
        """Flushes to the disk; returns {bytes, crc32c} for a manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "crc32c": self._crc}

    def abandon(self) -> None:
        """Closes the file without making it durable; harmless after `close`."""
        self._file.close()


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a small JSON file with its own digest: whole, durable, or not at all."""
    write_text(path, _text(values))


def write_text(path: Path, text: str) -> None:
    """Writes a small file: whole, durable, or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
      UserError: unreadable, or not what was written.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        values = json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not JSON; restore it or prepare again with --force") from error
    # The text is compared too: some changed bytes (1e-05 to 1E-05) are no other values.
    if not isinstance(values, dict) or values.pop("digest", None) != digest(values) or text != _text(values):
        raise UserError(f"{path} is damaged: it does not match its digest; restore it or prepare again with --force")
    return values


def _text(values: dict[str, Any]) -> str:
    return json.dumps({**values, "digest": digest(values)}, ensure_ascii=False, indent=1)


def file_entry(path: Path) -> dict[str, int]:
    """Returns {bytes, crc32c} of a file for a manifest."""
    return {"bytes": path.stat().st_size, "crc32c": file_crc32c(path)}


def check_size(path: Path, expected: dict[str, int]) -> None:
    """Refuses a file that is missing or of another size than its manifest says."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; restore it or prepare again with --force") from error
    if size != expected["bytes"]:
        mend = "restore it or prepare again with --force"
        raise UserError(f"{path} is damaged: {size} bytes instead of {expected['bytes']}; {mend}")


def map_array(path: Path, dtype: npt.DTypeLike, expected: dict[str, int], *, verify: bool) -> npt.NDArray[Any]:
    """Maps a file as a one-dimensional read-only array, its size and optionally all of its bytes checked."""
    check_size(path, expected)
    if verify and file_crc32c(path) != expected["crc32c"]:
        raise UserError(f"{path} is damaged: checksum mismatch; restore it or prepare again with --force")
    if not expected["bytes"]:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def file_crc32c(path: Path) -> int:
    """The crc32c of a whole file, read in pieces."""
    crc = 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            crc = google_crc32c.extend(crc, data)
    return crc
