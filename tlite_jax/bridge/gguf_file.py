"""A GGUF file's metadata and tensors, believing none of its counts and lengths.

The `gguf` library's own reader trusts them, and takes ten seconds over Llama-3's vocabulary; the library knows the
tensor types and undoes their quantisation here. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from tlite_jax.bridge.files import refuse_pointer, shown
from tlite_jax.bridge.safetensors_io import MAX_ROW_VALUES, Problem, row_values
from tlite_jax.bridge.stored import StoredTensor, read_rows_of
from tlite_jax.errors import UserError

# Llama-3's header has 0.7 million items in 8 MB.
MAX_HEADER_BYTES = 256 << 20
MAX_ITEMS = 4_000_000
MAX_TENSORS = 100_000
DEFAULT_ALIGNMENT = 32
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # value type -> struct's code
_STRING, _ARRAY = 8, 9
_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class TensorEntry(NamedTuple):
    """A tensor in the header."""

    name: str
    shape: tuple[int, ...]  # slowest dim first, as numpy's
    kind: Any  # gguf.GGMLQuantizationType
    offset: int  # from the beginning of the data
    num_bytes: int


def read(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Returns the metadata by key, and the tensors by name, unread.

    A tensor's dtype is float32, float16, bfloat16 or the name of its quantisation (`Q4_K`); reading a quantised one
    gives float32.

    Raises:
      UserError: not a GGUF file, or one whose counts, strings, arrays or tensors leave it, repeat or overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = Header(path, file, size)
            metadata, tensors, begin = header.read()
            for problem in layout_problems(tensors, size - begin):
                header.fail(problem.text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return metadata, stored_tensors(path, tensors, begin)


def stored_tensors(path: Path, tensors: Sequence[TensorEntry], begin: int) -> dict[str, StoredTensor]:
    """The header's tensors by name, to be read from the file, whose data begins at `begin`."""
    stored = {}
    for tensor in tensors:
        dtype = _FLOATS.get(tensor.kind.name)
        read_tensor = partial(_read, path, begin, tensor)
        stored[tensor.name] = StoredTensor(tensor.shape, dtype.name if dtype else tensor.kind.name, read_tensor)
    return stored


def layout_problems(tensors: Sequence[TensorEntry], data_bytes: int) -> Iterator[Problem]:
    """Tensors that overlap or leave the file.

    Args:
      tensors: the header's entries.
      data_bytes: the file's size from where the data begins.
    """
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            text = f"tensors {shown(before)!r} and {shown(tensor.name)!r} overlap"
            yield Problem(text, tensor.offset, end - tensor.offset)
        reached = tensor.offset + tensor.num_bytes
        if reached > data_bytes:
            text = f"tensor {shown(tensor.name)!r} leaves the file; fetch it again"
            yield Problem(text, data_bytes, reached - data_bytes, tensor.name)
        if reached >= end:
            end, before = reached, tensor.name


def gaps(tensors: Sequence[TensorEntry], data_bytes: int, alignment: int) -> Iterator[Problem]:
    """What an import bears and llama.cpp does not: tensors out of the header's order; bytes that belong to none."""
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            text = f"tensor {shown(tensor.name)!r} begins at {tensor.offset}, not at {expected}: llama.cpp refuses that"
            yield Problem(text, min(tensor.offset, expected), abs(tensor.offset - expected))
            return
        expected += tensor.num_bytes + -tensor.num_bytes % alignment
    if data_bytes > expected:
        left = data_bytes - expected
        yield Problem(f"{left} bytes after the last tensor belong to none", expected, left)


def require_decoder(kind: str, path: Path) -> None:
    """Raises UserError unless tensors of this type can be read: floats, or quantised ones that `gguf` undoes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if kind in {dtype.name for dtype in _FLOATS.values()}:
        return
    try:
        known = GGMLQuantizationType[kind]
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except (NotImplementedError, KeyError, ValueError) as error:
        raise UserError(f"{path}: tensors are {kind}, which gguf cannot undo") from error


def _read(path: Path, begin: int, tensor: TensorEntry, rows: slice) -> np.ndarray:
    from gguf import dequantize, quant_shape_to_byte_shape

    offset = begin + tensor.offset
    if (dtype := _FLOATS.get(tensor.kind.name)) is not None:
        return read_rows_of(path, offset, tensor.shape, dtype, rows)
    if tensor.num_bytes == 0:
        return np.empty(tensor.shape, np.float32)[rows]
    try:
        shape = tuple(quant_shape_to_byte_shape(tensor.shape, tensor.kind))
        blocks = read_rows_of(path, offset, shape, np.dtype(np.uint8), rows)
        # Scales of damaged blocks may be anything; what they lead to is the caller's to judge.
        with np.errstate(all="ignore"):
            return dequantize(blocks, tensor.kind).reshape(blocks.shape[:-1] + tensor.shape[-1:])
    except (NotImplementedError, KeyError, ValueError) as error:
        raise UserError(f"{path}: {shown(tensor.name)} is {tensor.kind.name}, which gguf cannot undo") from error


class Header:
    """One pass over the header that reads nothing longer than the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = self.items = 0
        self.alignment = DEFAULT_ALIGNMENT

    def read(self) -> tuple[dict[str, Any], list[TensorEntry], int]:
        """Returns metadata, tensors and where their data begins."""
        magic = self.take(4) if self.size >= 24 else b""
        if magic != _MAGIC:
            refuse_pointer(magic + (self.take(4) if magic else b""), str(self.path))
            raise UserError(f"{self.path}: not a GGUF file")
        version, num_tensors, num_fields = self.unpack("IQQ")
        if version not in _VERSIONS:
            raise UserError(f"{self.path}: GGUF version {version} is not supported; supported: 2, 3 (little-endian)")
        metadata: dict[str, Any] = {}
        for _ in range(self.count(num_fields)):
            key = self.string()
            if key in metadata:
                self.fail(f"{shown(key)!r} is given twice")
            metadata[key] = self.value(*self.unpack("I"))
        if num_tensors > MAX_TENSORS:
            self.fail(f"it announces {num_tensors} tensors; more than {MAX_TENSORS} are refused")
        tensors = [self.tensor() for _ in range(self.count(num_tensors))]
        if len({tensor.name for tensor in tensors}) < len(tensors):
            self.fail("a tensor is listed twice")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"alignment {shown(repr(alignment))} is not a power of two")
        self.alignment = alignment
        begin = -(-self.position // alignment) * alignment
        return metadata, tensors, begin

    def value(self, kind: int) -> Any:
        """A metadata value: a scalar, a string, or a list of either."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind != _ARRAY:
            self.fail(f"value type {kind} is not known")
        element, length = self.unpack("IQ")
        self.count(length)
        if element == _STRING:
            return [self.string() for _ in range(length)]
        if element not in _SCALARS:
            self.fail(f"arrays of type {element} are not known")
        return list(self.unpack(f"{length}{_SCALARS[element]}"))

    def tensor(self) -> TensorEntry:
        """A tensor's entry."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string()
        (num_dims,) = self.unpack("I")
        if not 1 <= num_dims <= 4:
            self.fail(f"tensor {shown(name)!r} has {num_dims} dims")
        *dims, code, offset = self.unpack(f"{num_dims}QIQ")
        try:
            kind = GGMLQuantizationType(code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            self.fail(f"tensor {shown(name)!r} has type {code}, which is not known")
        if dims[0] % block:
            self.fail(f"tensor {shown(name)!r} has rows of {dims[0]}, not a multiple of {block}")
        if (values := row_values(tuple(reversed(dims)))) > MAX_ROW_VALUES:
            self.fail(f"tensor {shown(name)!r} has rows of {values} values; {MAX_ROW_VALUES} at most")
        return TensorEntry(name, tuple(reversed(dims)), kind, offset, math.prod(dims) // block * block_bytes)

    def string(self) -> str:
        """A length and as many bytes of UTF-8."""
        content = self.take(*self.unpack("Q"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{content[:40]!r} is not UTF-8")

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Little-endian scalars, unpadded."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def count(self, number: int) -> int:
        """A number of items to come, refused when the file cannot hold them."""
        self.items += number
        if number > self.size or self.items > MAX_ITEMS:
            self.fail(f"it announces {number} items")
        return number

    def take(self, length: int) -> bytes:
        """The next bytes."""
        self.position += length
        if self.position > min(self.size, MAX_HEADER_BYTES):
            self.fail("its header leaves the file; fetch it again")
        return self.file.read(length)

    def fail(self, reason: str) -> NoReturn:
        """Raises the error."""
        raise UserError(f"{self.path}: damaged GGUF file: {reason}")
