"""A GGUF file's structure, checked before the `gguf` library (which trusts every count and length) reads it."""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from tlite_jax.errors import UserError

# Llama-3's header has 0.7 million items in 8 MB.
MAX_HEADER_BYTES = 256 << 20
MAX_ITEMS = 8_000_000
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
_STRING, _ARRAY = 8, 9


def check(path: Path) -> None:
    """Walks the header: magic, version, counts, strings, arrays and tensors must all lie within the file.

    Raises:
      UserError: what is wrong, in one line.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _Walk(path, file, size).header()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


class _Walk:
    """One pass over the header that reads nothing longer than the file has."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = self.items = 0
        self.limit = min(size, MAX_HEADER_BYTES)

    def header(self) -> None:
        if self.take(4) != _MAGIC:
            raise UserError(f"{self.path}: not a GGUF file")
        (version,) = struct.unpack("<I", self.take(4))
        if version not in _VERSIONS:
            raise UserError(f"{self.path}: GGUF version {version} is not supported; supported: 2, 3 (little-endian)")
        num_tensors, num_fields = struct.unpack("<QQ", self.take(16))
        alignment = 32
        for _ in range(self.count(num_fields)):
            key = self.string()
            (kind,) = struct.unpack("<I", self.take(4))
            if key == b"general.alignment" and kind == 4:
                (alignment,) = struct.unpack("<I", self.take(4))
            else:
                self.value(kind)
        tensors = [self.tensor() for _ in range(self.count(num_tensors))]
        if alignment < 1 or alignment & (alignment - 1):
            self.fail(f"alignment {alignment} is not a power of two")
        begin = math.ceil(self.position / alignment) * alignment
        for name, offset, num_bytes in tensors:
            if offset % alignment or begin + offset + num_bytes > self.size:
                self.fail(f"tensor {name!r} leaves the file: truncated, fetch it again")

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.string()
        elif kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _ARRAY and depth == 0:
            element, length = struct.unpack("<IQ", self.take(12))
            for _ in range(self.count(length)):
                self.value(element, depth + 1)
        else:
            self.fail(f"value type {kind} is not known")

    def tensor(self) -> tuple[str, int, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string().decode("utf-8", "replace")
        (num_dims,) = struct.unpack("<I", self.take(4))
        if not 1 <= num_dims <= 4:
            self.fail(f"tensor {name!r} has {num_dims} dims")
        *dims, kind, offset = struct.unpack(f"<{num_dims}QIQ", self.take(8 * num_dims + 12))
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            self.fail(f"tensor {name!r} has type {kind}, which is not known")
        if dims[0] % block:
            self.fail(f"tensor {name!r} has rows of {dims[0]}, not a multiple of {block}")
        return name, offset, math.prod(dims) // block * block_bytes

    def string(self) -> bytes:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length)

    def count(self, number: int) -> int:
        """A number of items to come, refused when the file cannot hold them."""
        self.items += number
        if self.items > MAX_ITEMS or number > self.size:
            self.fail(f"it announces {number} items")
        return number

    def take(self, length: int) -> bytes:
        self.advance(length)
        return self.file.read(length)

    def skip(self, length: int) -> None:
        self.advance(length)
        self.file.seek(length, 1)

    def advance(self, length: int) -> None:
        self.position += length
        if self.position > self.limit:
            self.fail("the header leaves the file: truncated, fetch it again")

    def fail(self, reason: str) -> None:
        raise UserError(f"{self.path}: damaged GGUF file: {reason}")
