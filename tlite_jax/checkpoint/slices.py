"""Parameters in a checkpoint, stored so that a slice of a layer is read without the rest of its array.

Orbax lays a checkpoint out as zarr arrays, by names joined with dots.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from tlite_jax.checkpoint.reader import open_array
from tlite_jax.model.decoder import ParamSpec

CHUNK_BYTES = 64 << 20
_CACHE_BYTES = 1 << 30


def save_args(params: Any) -> Any:
    """How Orbax stores each parameter: in chunks of at most CHUNK_BYTES, each of one layer.

    An array is one chunk by default, and reading any part of it takes all of its memory (7.5 GB for the stacked gate of
    Llama-3-8B in float32).
    """

    def chunked(path: Any, leaf: Any) -> ocp.SaveArgs:
        is_stacked = len(path) > 1  # blocks/NAME: the leading axis counts layers
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if is_stacked else ())

    return jax.tree_util.tree_map_with_path(chunked, params)


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

    def opened(name: str, spec: ParamSpec) -> Any:
        array = open_array(directory, name, context)
        return array[tuple(slice(0, size) for size in spec.shape)]  # what is beyond is padding

    def walk(node: Any, prefix: str) -> Any:
        if isinstance(node, dict):
            return {name: walk(child, f"{prefix}.{name}" if prefix else name) for name, child in node.items()}
        return opened(prefix, node)

    return walk(specs, "")
