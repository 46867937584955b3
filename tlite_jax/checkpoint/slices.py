"""Parameters in a checkpoint, stored so that a slice of a layer is read, and written, without the rest of its array.

Orbax lays a checkpoint out as zarr arrays in an OCDBT store, by names joined with dots. `write_arrays` fills such a
store chunk by chunk; Orbax restores from it as from its own.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from tlite_jax.errors import UserError
from tlite_jax.model.decoder import ParamSpec

CHUNK_BYTES = 64 << 20
_CACHE_BYTES = 1 << 30
_WRITERS = 4  # threads; each holds a chunk


def save_args(params: Any) -> Any:
    """How Orbax stores each parameter: in chunks of at most CHUNK_BYTES, each of one layer.

    An array is one chunk by default, and reading any part of it takes all of its memory (7.5 GB for the stacked gate of
    Llama-3-8B in float32).
    """

    def chunked(path: Any, leaf: Any) -> ocp.SaveArgs:
        is_stacked = len(path) > 1  # blocks/NAME: the leading axis counts layers
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if is_stacked else ())

    return jax.tree_util.tree_map_with_path(chunked, params)


def write_arrays(directory: Path, params: Any, report: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Writes parameters of any size as the store of an Orbax item, each chunk once, holding a few chunks in memory.

    Args:
      directory: the `params` item, without arrays yet.
      params: nested dict of arrays; of each, `shape` and `dtype` are used, and slices, several threads at once.
      report: called with (bytes written, bytes in all).
    """
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{directory.absolute()}/"}).result()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    done, total = 0, sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)

    def tasks() -> Iterator[tuple[Any, Any, tuple[slice, ...]]]:
        for path, leaf in leaves:
            chunks = _chunks(leaf.shape, leaf.dtype.itemsize, is_stacked=len(path) > 1)
            array = _create(store / f"{'.'.join(key.key for key in path)}/", leaf, chunks)
            for piece in _pieces(leaf.shape, chunks):
                yield leaf, array, piece

    def write(task: tuple[Any, Any, tuple[slice, ...]]) -> int:
        leaf, array, piece = task
        content = np.ascontiguousarray(leaf[piece])
        array[piece].write(content, can_reference_source_data_indefinitely=True).result()
        return content.nbytes

    with ThreadPoolExecutor(_WRITERS) as pool:
        try:
            for num_bytes in pool.map(write, tasks()):
                done += num_bytes
                report(done, total)
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Where each chunk of an array lies in it."""
    ranges = [
        [slice(begin, min(begin + chunk, size)) for begin in range(0, size, chunk)]
        for size, chunk in zip(shape, chunks, strict=True)
    ]
    return itertools.product(*ranges)


def _chunks(shape: tuple[int, ...], itemsize: int, *, is_stacked: bool) -> tuple[int, ...]:
    """Of whole rows, at most CHUNK_BYTES where a row is no longer; of one layer, but vectors of all layers together."""
    layers, rest = ((1,), shape[1:]) if is_stacked and len(shape) > 2 else ((), shape)
    row_bytes = int(np.prod(rest[1:])) * itemsize
    num_chunks = max(-(-rest[0] * row_bytes // CHUNK_BYTES), 1)
    return (*layers, max(-(-rest[0] // num_chunks), 1), *(max(size, 1) for size in rest[1:]))


def _create(store: Any, leaf: Any, chunks: tuple[int, ...]) -> Any:
    """An empty zarr array as Orbax makes it, but not compressed: weights hardly shrink, and reading waits for it."""
    dtype = "bfloat16" if leaf.dtype.name == "bfloat16" else leaf.dtype.newbyteorder("<").str
    metadata = {"shape": leaf.shape, "chunks": chunks, "dtype": dtype, "fill_value": None, "compressor": None}
    spec = {
        "driver": "zarr",
        "metadata": {**metadata, "dimension_separator": "."},
        "store_data_equal_to_fill_value": True,  # that data is there is how Orbax knows that it was written
    }
    return tensorstore.open(spec, kvstore=store, create=True).result()


def open_arrays(directory: Path, specs: Any) -> dict[str, Any]:
    """Opens the parameters of a checkpoint and reads none.

    Args:
      directory: the `params` item of a checkpoint.
      specs: the model's `param_specs`.

    Returns:
      Nested dict of TensorStore arrays of logical shapes, which slice like numpy's and are read by `numpy.asarray`.

    Raises:
      UserError: a parameter is absent or cannot be opened.
    """
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    base = f"file://{directory.absolute()}/"

    def opened(name: str, spec: ParamSpec) -> Any:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, context=context).result()
        except ValueError as error:
            raise UserError(f"{directory}: {name} cannot be opened: {str(error).splitlines()[0]}") from error
        return array[tuple(slice(0, size) for size in spec.shape)]  # what is beyond is padding

    def walk(node: Any, prefix: str) -> Any:
        if isinstance(node, dict):
            return {name: walk(child, f"{prefix}.{name}" if prefix else name) for name, child in node.items()}
        return opened(prefix, node)

    return walk(specs, "")
