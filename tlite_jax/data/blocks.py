"""Checksums of a file's blocks, so that damage in a large file has a place."""

from pathlib import Path
from typing import Any

import google_crc32c

from tlite_jax.data.files import ChecksummedFile

BLOCK_BYTES = 1 << 16


class BlockFile(ChecksummedFile):
    """A new file that is also checksummed in blocks of BLOCK_BYTES; a file of one block needs none."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._blocks: list[int] = []
        self._pending = b""

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        super().write(data)
        self._pending += data
        whole = len(self._pending) // BLOCK_BYTES * BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            self._blocks.append(google_crc32c.value(self._pending[start : start + BLOCK_BYTES]))
        self._pending = self._pending[whole:]

    def close(self) -> dict[str, Any]:
        """Flushes to the disk; returns {bytes, crc32c} and, where there are several, {blocks} for a manifest."""
        values: dict[str, Any] = super().close()
        if not self._blocks:
            return values
        rest = [google_crc32c.value(self._pending)] if self._pending else []
        return {**values, "blocks": [*self._blocks, *rest]}
