"""Tensors that lie in a file, and parameters made of them: sliced as numpy's arrays, read no further."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlite_jax.errors import UserError

ALL_ROWS = slice(None)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in some file, not read yet."""

    shape: tuple[int, ...]
    dtype: str  # numpy's or ml_dtypes' name, or the format's own (a quantisation)
    read_rows: Callable[[slice], np.ndarray]
    forget_rows: Callable[[slice], None] = lambda rows: None

    def read(self, rows: slice = ALL_ROWS) -> np.ndarray:
        """Returns rows of it, all by default; a scalar has none and is read whole."""
        return self.read_rows(rows)

    def forget(self, rows: slice) -> None:
        """Rows that have been read will not be again: what memory the system keeps for them, it may use otherwise."""
        self.forget_rows(rows)


class StoredParam:
    """A parameter of ours that lies in a file as one tensor, or as one tensor a layer.

    Indexing takes integers and slices of step 1 and returns numpy arrays; only the rows asked for are read, whole (a
    sharded parameter is split along rows, so a process reads its own). `numpy.asarray` reads all of it. Several
    threads may read at once.

    Args:
      tensors: equal in shape.
      dtype: of what is read; wide enough for each of them.
      is_stacked: the leading axis counts the tensors; otherwise there is one.
    """

    def __init__(self, tensors: Sequence[StoredTensor], dtype: np.dtype, *, is_stacked: bool) -> None:
        assert is_stacked or len(tensors) == 1, f"{len(tensors)} tensors"
        self._tensors = tensors
        self._is_stacked = is_stacked
        self.dtype = dtype
        self.shape = (len(tensors), *tensors[0].shape) if is_stacked else tensors[0].shape
        self.ndim, self.size = len(self.shape), math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if not self._is_stacked:
            return self._part(self._tensors[0], index)
        layers, *rest = index
        if not isinstance(layers, slice):
            return self._part(self._tensors[layers], rest)
        parts = [self._part(tensor, rest) for tensor in self._tensors[layers]]
        if len(parts) == 1:
            return parts[0][np.newaxis]  # no copy: most slices are of one layer
        return np.stack(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def forget(self, rows: slice, layer: int = 0) -> None:
        """See `StoredTensor`; of one layer where they are stacked."""
        self._tensors[layer].forget(rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        assert copy is not False, "what lies in a file cannot be had without copying it"
        return self[:].astype(dtype or self.dtype, copy=False)

    def _part(self, tensor: StoredTensor, index: Sequence[Any]) -> np.ndarray:
        rows = index[0] if index else ALL_ROWS
        if isinstance(rows, slice):
            part = tensor.read(rows)
        else:
            rows = range(tensor.shape[0])[rows]
            part = tensor.read(slice(rows, rows + 1))[0]
            return part[tuple(index[1:])].astype(self.dtype, copy=False)
        return part[(slice(None), *index[1:])].astype(self.dtype, copy=False)


def in_whole_units(tensor: StoredTensor, unit: int, change: Callable[[np.ndarray], np.ndarray]) -> StoredTensor:
    """The tensor with `change` made to its rows, which takes multiples of `unit` of them: whole heads."""

    def read_rows(rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(tensor.shape[0])
        first = begin // unit * unit
        whole = change(tensor.read(slice(first, -(-end // unit) * unit)))
        return whole[begin - first : end - first]

    return StoredTensor(tensor.shape, tensor.dtype, read_rows)


def read_rows_of(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, rows: slice) -> np.ndarray:
    """Reads rows of a tensor that lies in a file, and no other bytes.

    Args:
      path: the file.
      offset: where the tensor begins.
      shape: of the tensor; a scalar is read whole.
      dtype: of the tensor.
      rows: which.

    Raises:
      UserError: the file cannot be read, or ends before.
    """
    begin, count, row_bytes = _span(shape, dtype, rows)
    content = read_bytes(path, offset + begin * row_bytes, count * row_bytes)
    return content.view(dtype).reshape((count, *shape[1:]) if shape else ())


def forget_rows_of(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, rows: slice) -> None:
    """Takes rows of a tensor, given as for `read_rows_of`, out of the page cache."""
    begin, count, row_bytes = _span(shape, dtype, rows)
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), offset + begin * row_bytes, count * row_bytes, os.POSIX_FADV_DONTNEED)


def _span(shape: tuple[int, ...], dtype: np.dtype, rows: slice) -> tuple[int, int, int]:
    """The first of some rows, how many they are, and the bytes of each."""
    num_rows, *rest = shape or (1,)
    begin, end, step = rows.indices(num_rows)
    assert step == 1, f"step {step}"
    return begin, max(end - begin, 0), math.prod(rest) * dtype.itemsize


def read_bytes(path: Path, offset: int, num_bytes: int) -> np.ndarray:
    """Reads [num_bytes] uint8 from a place in a file.

    Raises:
      UserError: the file cannot be read, or ends before.
    """
    content, done = np.empty(num_bytes, np.uint8), 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < num_bytes:
                count = file.readinto(content.data[done:])
                if not count:
                    raise UserError(f"{path}: ends at {offset + done}, while it is read: it was cut short meanwhile")
                done += count
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return content
