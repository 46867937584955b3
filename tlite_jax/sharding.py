"""FSDP hybrid shard, said in collectives: the mesh (replica, fsdp, context), padded shards, gathers and reductions.

Parameters are sharded over `fsdp` and `context` along one dim each and replicated over `replica`. The dim is stored
padded to a multiple of the shard count, so that any number of devices works; the padding is zero and stays zero.
Rows of a batch are dealt out over `replica` and `fsdp`; the tokens of a row over `context`, whose size is mostly 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.errors import UserError

REPLICA, FSDP, CONTEXT = "replica", "fsdp", "context"
SHARDS = (FSDP, CONTEXT)  # what parameters are sharded over
DEVICES = (REPLICA, FSDP, CONTEXT)
BATCH_SPEC = PartitionSpec((REPLICA, FSDP), CONTEXT)  # of [B, T]
ROWS_SPEC = PartitionSpec(DEVICES)  # of [B, T] where rows stay whole


class Spec(Protocol):
    """What sharding needs to know of a parameter (`model.decoder.ParamSpec`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""

    @property
    def sharded_dim(self) -> int:
        """The dim that is split over devices."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (replica, fsdp, context) mesh; consecutive devices, a node's, share shards of parameters.

    Raises:
      UserError: when the devices do not make up the mesh; names the meshes that fit.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = config.fsdp or max(1, len(devices) // (config.replica * config.context))
    needed = config.replica * fsdp * config.context
    if needed != len(devices):
        groups, rest = divmod(len(devices), config.context)
        fits = [f"{groups // d} x {d}" for d in range(1, groups + 1) if groups % d == 0 and not rest]
        raise UserError(
            f"mesh: replica {config.replica} x fsdp {fsdp}{_by_context(config)} needs {needed} devices, "
            f"found {len(devices)}; replica x fsdp that fit{_by_context(config)}: {', '.join(fits) or 'none'}"
        )
    grid = np.asarray(devices).reshape(config.replica, fsdp, config.context)
    return Mesh(grid, DEVICES, axis_types=(AxisType.Auto,) * 3)


def _by_context(config: MeshConfig) -> str:
    return f" x context {config.context}" if config.context > 1 else ""


def num_shards(mesh: Mesh) -> int:
    """Devices that a parameter is sharded over."""
    return mesh.shape[FSDP] * mesh.shape[CONTEXT]


def padded_shape(spec: Spec, num_shards: int) -> tuple[int, ...]:
    """The stored shape: the sharded dim rounded up to a multiple of the shard count."""
    shape = list(spec.shape)
    shape[spec.sharded_dim] = -(-shape[spec.sharded_dim] // num_shards) * num_shards
    return tuple(shape)


def partition_spec(spec: Spec) -> PartitionSpec:
    """The sharded dim over `fsdp` and `context`, the others whole."""
    return PartitionSpec(*[None] * spec.sharded_dim, SHARDS)


def map_specs(function: Callable[..., Any], specs: Any, *trees: Any) -> Any:
    """jax.tree.map over a nested dict whose leaves are Specs."""
    return jax.tree.map(function, specs, *trees, is_leaf=lambda leaf: hasattr(leaf, "sharded_dim"))


def partition_specs(specs: Any) -> Any:
    """The nested dict of PartitionSpecs."""
    return map_specs(partition_spec, specs)


def abstract_params(specs: Any, mesh: Mesh, dtype: str = "float32") -> Any:
    """The nested dict of stored, sharded, unallocated parameters."""
    return map_specs(
        lambda spec: jax.ShapeDtypeStruct(
            padded_shape(spec, num_shards(mesh)),
            dtype,
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


def place_params(params: Any, specs: Any, mesh: Mesh, dtype: str = "float32") -> Any:
    """Arrays of logical shapes, any float dtype -> stored, sharded parameters; each device is sent its shard.

    Arrays that lie in a file (`bridge.stored.StoredParam`) are read by shards: a process reads those of its devices,
    each once, however many replicas it holds.
    """

    def place(spec: Spec, array: np.ndarray, stored: jax.ShapeDtypeStruct) -> jax.Array:
        shards: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

        def shard(index: Any) -> np.ndarray:  # a tuple of slices
            place = tuple(position.indices(size) for position, size in zip(index, stored.shape, strict=True))
            if place not in shards:
                part = np.asarray(array[index]).astype(stored.dtype)
                widths = [(0, len(range(*want)) - have) for want, have in zip(place, part.shape, strict=True)]
                shards[place] = np.pad(part, widths)
            return shards[place]

        return jax.make_array_from_callback(stored.shape, stored.sharding, shard)

    return map_specs(place, specs, params, abstract_params(specs, mesh, dtype))


@dataclass(frozen=True)
class Collectives:
    """How shards of parameters become whole, and whole gradients shards; to be used under shard_map.

    Attributes:
      num_shards, num_replicas: devices that a parameter is sharded over, and replicas of it.
      compute_dtype: of gathered parameters, on the wire and in the matmuls.
      reduce_dtype: of gradients on the wire between those that shard a parameter.
      replica_reduce_dtype: of gradients on the wire between replicas.
    """

    num_shards: int
    num_replicas: int
    compute_dtype: str
    reduce_dtype: str
    replica_reduce_dtype: str

    @classmethod
    def of(cls, mesh: Mesh, execution: ExecutionConfig) -> "Collectives":
        """Those of a mesh, with the dtypes that a config asks for."""
        return cls(
            num_shards=num_shards(mesh),
            num_replicas=mesh.shape[REPLICA],
            compute_dtype=execution.compute_dtype,
            reduce_dtype=execution.reduce_dtype,
            replica_reduce_dtype=execution.replica_reduce_dtype,
        )

    @jax.named_scope("gather")
    def gather(self, shards: Any, specs: Any) -> Any:
        """All-gathers float32 shards; whole parameters in the compute dtype, without padding."""

        def whole(spec: Spec, shard: jax.Array) -> jax.Array:
            shard = shard.astype(self.compute_dtype)
            if self.num_shards == 1:
                return shard
            dim = spec.sharded_dim
            padded = jax.lax.all_gather(shard, SHARDS, axis=dim, tiled=True)
            return jax.lax.slice_in_dim(padded, 0, spec.shape[dim], axis=dim)

        return map_specs(whole, specs, shards)

    @jax.named_scope("reduce_scatter")
    def scatter(self, gradients: Any, specs: Any) -> Any:
        """Reduce-scatters whole gradients, in the reduce dtype on the wire; float32 shards, padded."""

        def shard(spec: Spec, gradient: jax.Array) -> jax.Array:
            if self.num_shards == 1:
                return gradient.astype(jnp.float32)
            dim = spec.sharded_dim
            padding = padded_shape(spec, self.num_shards)[dim] - spec.shape[dim]
            widths = [(0, padding if axis == dim else 0) for axis in range(gradient.ndim)]
            padded = jnp.pad(gradient.astype(self.reduce_dtype), widths)
            return jax.lax.psum_scatter(padded, SHARDS, scatter_dimension=dim, tiled=True).astype(jnp.float32)

        return map_specs(shard, specs, gradients)

    def accumulate(self, sums: Any, gradients: Any, specs: Any) -> Any:
        """Shards of sums of gradients, with whole gradients added."""
        # Behind a barrier: XLA for TPUs would add up whole gradients and reduce-scatter them after the microbatches.
        return jax.tree.map(jnp.add, sums, jax.lax.optimization_barrier(self.scatter(gradients, specs)))

    @jax.named_scope("sum_replicas")
    def sum_replicas(self, shards: Any) -> Any:
        """Sums float32 shards over `replica`, in the replica dtype on the wire."""
        if self.num_replicas == 1:
            return shards
        wire = jax.tree.map(lambda shard: shard.astype(self.replica_reduce_dtype), shards)
        return jax.tree.map(lambda shard: jax.lax.psum(shard, REPLICA).astype(jnp.float32), wire)


@dataclass(frozen=True)
class _Whole:
    shape: tuple[int, ...]
    sharded_dim: int = 0


def make_gather(axis_sizes: Mapping[str, int], collectives: Collectives) -> Callable:
    """The model's `gather` hook: makes an nnx.Param, or every one of a Block, whole. For inference: no gradients.

    Args:
      axis_sizes: logical axis -> size (`model.decoder.logical_axes`).
      collectives: of the mesh.
    """

    def gather_param(param: nnx.Param) -> nnx.Variable:
        shard = param[...]
        return param.replace(collectives.gather(shard, _Whole((axis_sizes[param.axes[0]], *shard.shape[1:]))))

    return lambda part: jax.tree.map(gather_param, part, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
