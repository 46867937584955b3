"""Shards that several processes hold, and of which each has read what its own disk has of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def unite(tree: Any, mesh: Mesh) -> Any:
    """Gives each replica of a shard what any of them has; all processes call it.

    Args:
      tree: of arrays on the mesh, whose replicas may differ between processes: each element is its value or zero bits.
      mesh: theirs.

    Returns:
      The same with equal replicas; the arrays given are used up.
    """
    leaves, structure = jax.tree.flatten(tree)
    shared = [number for number, leaf in enumerate(leaves) if _is_shared(leaf)]
    if not shared:
        return tree
    specs = [leaves[number].sharding.spec for number in shared]

    def over_replicas(arrays: list[jax.Array]) -> list[jax.Array]:
        return [_any(array, _replica_axes(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]

    combine = jax.shard_map(over_replicas, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
    united = jax.jit(combine, donate_argnums=0)([leaves[number] for number in shared])
    for number, leaf in zip(shared, united, strict=True):
        leaves[number] = leaf
    return jax.tree.unflatten(structure, leaves)


def _is_shared(array: jax.Array) -> bool:
    """Whether a shard of it lies in several processes."""
    holders: dict[Any, set[int]] = {}
    places: dict[Any, Any] = dict(array.sharding.devices_indices_map(array.shape))
    for device, index in places.items():
        spans = tuple(part.indices(size) for part, size in zip(index, array.shape, strict=True))
        holders.setdefault(spans, set()).add(device.process_index)
    return any(len(processes) > 1 for processes in holders.values())


def _replica_axes(mesh: Mesh, spec: PartitionSpec) -> tuple[str, ...]:
    split = {axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part)}
    return tuple(axis for axis in mesh.axis_names if axis not in split)


def _any(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """As bits, so that every number comes through as it is; the others' are zero."""
    bits = jax.lax.bitcast_convert_type(array, _BITS[np.dtype(array.dtype).itemsize])
    return jax.lax.bitcast_convert_type(jax.lax.pmax(bits, axes), array.dtype)
