"""Digests of a sharded state, device by device: what tells two states apart, and where.

A digest is two sums modulo 2^32 of the bits of a shard, each word mixed with its place first (the finalizer of
MurmurHash3), so that two words that have changed places are seen too. One changed word always shows: the mixing is one
to one. Sums of integers do not depend on the order in which a device adds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax.sharding import REPLICA, SHARDS, num_shards

Digests = np.ndarray  # uint32 [replicas, shards, arrays, 2]


@dataclass(frozen=True)
class Differs:
    """An array that is not what it should be.

    Attributes:
      array: its name, such as params.blocks.query.
      devices: of the mesh, that hold something else than the others.
      sure: whether it is these and not the others; False where each half says otherwise.
    """

    array: str
    devices: tuple[jax.Device, ...]
    sure: bool = True


class Digester:
    """Computes digests of states of one shape on a mesh.

    Args:
      mesh: of the state.
      abstract: a state of arrays or ShapeDtypeStructs with NamedShardings, 4 bytes an element.
    """

    def __init__(self, mesh: Mesh, abstract: Any):
        self._devices = mesh.devices.reshape(mesh.shape[REPLICA], num_shards(mesh))
        leaves = jax.tree_util.tree_leaves_with_path(abstract)
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)
        self._whole = np.array([not any(leaf.sharding.spec) for _, leaf in leaves])  # the same on all devices
        local = jax.shard_map(
            lambda state: jnp.stack([_digest(leaf) for leaf in jax.tree.leaves(state)])[None, None],
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec(REPLICA, SHARDS),
            check_vma=False,
        )
        self._compute: Callable[[Any], jax.Array] = jax.jit(local, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, state: Any) -> Digests:
        """Waits for the state and gives its digests, on all processes alike."""
        return np.asarray(self._compute(state))

    def between(self, one: Digests, other: Digests) -> list[Differs]:
        """Where two states differ."""
        differ = (one != other).any(-1)
        found = zip(self._names, np.moveaxis(differ, -1, 0), strict=True)
        return [Differs(name, tuple(self._devices[where])) for name, where in found if where.any()]

    def among_replicas(self, digests: Digests) -> list[Differs]:
        """Where copies of one state that should be the same are not; the majority is right, if there is one."""
        found = []
        for i, name in enumerate(self._names):
            table, devices = digests[:, :, i], self._devices
            if self._whole[i]:
                table, devices = table.reshape(-1, 1, 2), devices.reshape(-1, 1)
            wrong, sure = [], True
            for shard in range(table.shape[1]):
                values, which, counts = np.unique(table[:, shard], axis=0, return_inverse=True, return_counts=True)
                if len(values) > 1:
                    most = 2 * counts.max() > len(table)
                    sure = sure and bool(most)
                    wrong += list(devices[which.reshape(-1) != counts.argmax() if most else slice(None), shard])
            if wrong:
                found.append(Differs(name, tuple(wrong), sure))
        return found


def _digest(shard: jax.Array) -> jax.Array:
    """uint32 [2] of one device's shard."""
    words = jax.lax.bitcast_convert_type(shard, jnp.uint32)
    place = jnp.zeros(shard.shape, jnp.uint32)
    for dim, size in enumerate(shard.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shard.shape, dim)
    one = _mix(words ^ (place * np.uint32(0x9E3779B1)))
    other = _mix(words + _mix(place + np.uint32(0x7F4A7C15)))
    return jnp.stack([one.sum(dtype=jnp.uint32), other.sum(dtype=jnp.uint32)])


def _mix(words: jax.Array) -> jax.Array:
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
