"""FSDP hybrid shard, said in collectives: the mesh (replica, fsdp), padded shards, and the gather of a layer.

Parameters are sharded over `fsdp` along one dim each and replicated over `replica`. The dim is stored padded to a
multiple of the shard count, so that any number of devices works; the padding is zero and stays zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tlite_jax.config import MeshConfig
from tlite_jax.errors import UserError

REPLICA, FSDP = "replica", "fsdp"
BATCH_SPEC = PartitionSpec((REPLICA, FSDP))


class Spec(Protocol):
    """What sharding needs to know of a parameter (`model.decoder.ParamSpec`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""

    @property
    def sharded_dim(self) -> int:
        """The dim that is split over `fsdp`."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (replica, fsdp) mesh; consecutive devices, a node's, share an fsdp group.

    Raises:
      UserError: when the devices do not make up the mesh; names the meshes that fit.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = config.fsdp or max(1, len(devices) // config.replica)
    if config.replica * fsdp != len(devices):
        fits = [f"{len(devices) // d} x {d}" for d in range(1, len(devices) + 1) if len(devices) % d == 0]
        raise UserError(
            f"mesh: replica {config.replica} x fsdp {fsdp} needs {config.replica * fsdp} devices, "
            f"found {len(devices)}; replica x fsdp that fit: {', '.join(fits)}"
        )
    grid = np.asarray(devices).reshape(config.replica, fsdp)
    return Mesh(grid, (REPLICA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def padded_shape(spec: Spec, num_shards: int) -> tuple[int, ...]:
    """The stored shape: the sharded dim rounded up to a multiple of the shard count."""
    shape = list(spec.shape)
    shape[spec.sharded_dim] = -(-shape[spec.sharded_dim] // num_shards) * num_shards
    return tuple(shape)


def partition_spec(spec: Spec) -> PartitionSpec:
    """The sharded dim over `fsdp`, the others whole."""
    return PartitionSpec(*[None] * spec.sharded_dim, FSDP)


def map_specs(function: Callable[..., Any], specs: Any, *trees: Any) -> Any:
    """jax.tree.map over a nested dict whose leaves are Specs."""
    return jax.tree.map(function, specs, *trees, is_leaf=lambda leaf: hasattr(leaf, "sharded_dim"))


def partition_specs(specs: Any) -> Any:
    """The nested dict of PartitionSpecs."""
    return map_specs(partition_spec, specs)


def abstract_params(specs: Any, mesh: Mesh) -> Any:
    """The nested dict of stored, sharded, unallocated float32 parameters."""
    return map_specs(
        lambda spec: jax.ShapeDtypeStruct(
            padded_shape(spec, mesh.shape[FSDP]),
            jnp.float32,
            sharding=NamedSharding(mesh, partition_spec(spec)),
        ),
        specs,
    )


def pad_params(params: Any, specs: Any, num_shards: int) -> Any:
    """Logical -> stored shapes; the padding is zero."""

    def pad(spec: Spec, param: jax.Array) -> jax.Array:
        stored = padded_shape(spec, num_shards)
        return jnp.pad(param, [(0, new - old) for old, new in zip(spec.shape, stored, strict=True)])

    return map_specs(pad, specs, params)


def unpad_params(params: Any, specs: Any) -> Any:
    """Stored -> logical shapes."""
    return map_specs(lambda spec, param: param[tuple(slice(size) for size in spec.shape)], specs, params)


def make_gather(axis_sizes: Mapping[str, int], num_shards: int, compute_dtype: str, reduce_dtype: str) -> Callable:
    """The model's `gather` hook, to be called under shard_map on a mesh with an `fsdp` axis.

    Casts a shard to the compute dtype, collects the whole from the `fsdp` group and drops the padding. Its transpose
    casts to the reduce dtype and reduce-scatters over the group, which is where gradients are summed.

    Args:
      axis_sizes: logical axis -> size (`model.decoder.logical_axes`).
      num_shards: size of the `fsdp` axis.
      compute_dtype: of what is gathered, on the wire and in the matmuls.
      reduce_dtype: of gradients on the wire; the sum is kept in float32.
    """

    def gather_param(param: nnx.Param) -> nnx.Variable:
        size = axis_sizes[param.axes[0]]
        return param.replace(_collect(param[...], size, num_shards, compute_dtype, reduce_dtype))

    return lambda part: jax.tree.map(gather_param, part, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _collect(shard: jax.Array, size: int, num_shards: int, compute_dtype: str, reduce_dtype: str) -> jax.Array:
    """[size padded / num_shards, ...] float32 -> [size, ...] in the compute dtype."""
    if num_shards == 1:
        if shard.dtype == compute_dtype:
            return shard
        return checkpoint_name(shard.astype(compute_dtype), "gathered_weights")
    padding = shard.shape[0] * num_shards - size

    def whole(shard: jax.Array) -> jax.Array:
        return jax.lax.all_gather(shard.astype(compute_dtype), FSDP, axis=0, tiled=True)[:size]

    def forward(shard: jax.Array) -> tuple[jax.Array, None]:
        # Not a call of collect: that would hide the gather from rematerialisation policies.
        return whole(shard), None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        gradient = jnp.pad(gradient.astype(reduce_dtype), [(0, padding)] + [(0, 0)] * (gradient.ndim - 1))
        summed = jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=0, tiled=True)
        return (summed.astype(jnp.float32),)

    collect = jax.custom_vjp(whole)
    collect.defvjp(forward, backward)
    return checkpoint_name(collect(shard), "gathered_weights")
