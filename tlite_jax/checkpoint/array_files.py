"""Parameters of any size as the arrays of an Orbax item, in files that hold their bytes as they are.

Orbax restores zarr arrays from an OCDBT store or, as here, from a directory an array, a file a chunk. What is not
compressed has nothing to encode: whoever reads a piece of the source hashes it and writes it to its place.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore

from tlite_jax.checkpoint.seal import Entry, write_hashed
from tlite_jax.checkpoint.slices import CHUNK_BYTES

_PIECE_BYTES = 1 << 20  # the processor's cache still has it when it is written
_WRITERS = 4  # threads: some wait for the disk


class _Chunk(NamedTuple):
    """Rows of an array, or of one layer of it, that are a file."""

    name: str
    array: Any
    layer: tuple[int, ...]  # empty where the array is not cut by layers
    rows: range
    num_bytes: int  # of the file, which has zeros behind the rows of a last chunk

    @property
    def row_bytes(self) -> int:
        return math.prod(self.array.shape[len(self.layer) + 1 :]) * self.array.dtype.itemsize

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of the file."""
        for begin in self.rows[:: max(_PIECE_BYTES // self.row_bytes, 1)]:
            end = min(begin + max(_PIECE_BYTES // self.row_bytes, 1), self.rows.stop)
            rows = np.ascontiguousarray(self.array[(*self.layer, slice(begin, end))])
            yield rows.reshape(-1).view(np.uint8).data
        yield memoryview(bytes(self.num_bytes - len(self.rows) * self.row_bytes))

    def forget(self) -> None:
        """Tells the array that it will not be asked for these rows again."""
        if hasattr(self.array, "forget"):
            self.array.forget(slice(self.rows.start, self.rows.stop), *self.layer)


def write_arrays(
    directory: Path, params: Any, report: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Entry]:
    """Writes parameters, of which memory holds a few pieces.

    Args:
      directory: the `params` item, without arrays yet.
      params: nested dict of arrays; of each, `shape` and `dtype` are used, and slices, several threads at once; and
        `forget(rows, *layer)`, where there is one, when rows have been written.
      report: called with (bytes written, bytes in all).

    Returns:
      By name in the directory, the entries of the files of all chunks; these files are on the disk.
    """
    store = tensorstore.KvStore.open(f"file://{directory.absolute()}/").result()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    done, total = 0, sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)

    def chunks() -> Iterator[_Chunk]:
        for path, leaf in leaves:
            name, is_stacked = ".".join(key.key for key in path), len(path) > 1
            shape = _chunk_shape(leaf.shape, leaf.dtype.itemsize, is_stacked=is_stacked)
            _create(store / f"{name}/", leaf, shape)
            yield from _chunks(name, leaf, shape)

    def write(chunk: _Chunk) -> tuple[_Chunk, Entry]:
        entry = write_hashed(directory / chunk.name, chunk.pieces())
        chunk.forget()
        return chunk, entry

    entries = {}
    with ThreadPoolExecutor(_WRITERS) as pool:
        try:
            for chunk, entry in pool.map(write, chunks()):
                entries[chunk.name] = entry
                done += len(chunk.rows) * chunk.row_bytes
                report(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
    return entries


def _chunks(name: str, array: Any, shape: tuple[int, ...]) -> Iterator[_Chunk]:
    """The chunks of an array, all of that shape: whole rows, those of one layer or vectors of all layers."""
    dim = 1 if len(shape) > 2 else 0  # its rows are cut
    num_bytes = math.prod(shape) * array.dtype.itemsize
    for layer in itertools.product(*map(range, array.shape[:dim])):
        for number, begin in enumerate(range(0, array.shape[dim], shape[dim])):
            rows = range(begin, min(begin + shape[dim], array.shape[dim]))
            key = ".".join(map(str, (*layer, number, *(0 for _ in shape[dim + 1 :]))))
            yield _Chunk(f"{name}/{key}", array, layer, rows, num_bytes)


def _chunk_shape(shape: tuple[int, ...], itemsize: int, *, is_stacked: bool) -> tuple[int, ...]:
    """Of whole rows, at most CHUNK_BYTES where a row is no longer; of one layer, but vectors of all layers together."""
    layers, rest = ((1,), shape[1:]) if is_stacked and len(shape) > 2 else ((), shape)
    row_bytes = math.prod(rest[1:]) * itemsize
    num_chunks = max(-(-rest[0] * row_bytes // CHUNK_BYTES), 1)
    return (*layers, max(-(-rest[0] // num_chunks), 1), *(max(size, 1) for size in rest[1:]))


def _create(store: Any, leaf: Any, chunk_shape: tuple[int, ...]) -> None:
    """An empty zarr array as Orbax makes it, but not compressed: weights hardly shrink, and reading waits for it."""
    dtype = "bfloat16" if leaf.dtype.name == "bfloat16" else leaf.dtype.newbyteorder("<").str
    metadata = {"shape": leaf.shape, "chunks": chunk_shape, "dtype": dtype, "fill_value": None, "compressor": None}
    spec = {"driver": "zarr", "metadata": {**metadata, "dimension_separator": "."}}
    tensorstore.open(spec, kvstore=store, create=True).result()
