"""What training carries from step to step, as sharded arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax import optimizer
from tlite_jax.config import ModelConfig
from tlite_jax.model.decoder import init_params, param_specs
from tlite_jax.optimizer import AdamState
from tlite_jax.sharding import abstract_params, num_shards, pad_params


class TrainState(NamedTuple):
    """Float32 masters and moments, sharded over devices; step is the number of batches completed in this run."""

    step: jax.Array
    params: Any
    optimizer: AdamState


def abstract_state(model: ModelConfig, mesh: Mesh) -> Any:
    """A TrainState of ShapeDtypeStructs with shardings; nothing is allocated."""
    params = abstract_params(param_specs(model), mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    adam: Any = AdamState._make((scalar, params, params))
    return TrainState._make((scalar, params, adam))


def shardings(abstract: Any) -> Any:
    """The NamedSharding of every leaf of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(model: ModelConfig, mesh: Mesh, seed: int) -> TrainState:
    """Random parameters and zero moments, made on the mesh in their shards."""

    def init() -> TrainState:
        params = pad_params(init_params(model, seed), param_specs(model), num_shards(mesh))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=shardings(abstract_state(model, mesh)))()


def start_state(params: Any, adam: AdamState | None, mesh: Mesh) -> TrainState:
    """The state at step 0 of a run that starts from given (stored, sharded) parameters; adam None: zero moments."""
    scalar = NamedSharding(mesh, PartitionSpec())
    if adam is None:
        placement = shardings(params)
        make = jax.jit(optimizer.init, out_shardings=AdamState._make((scalar, placement, placement)))
        adam = make(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), scalar), params, adam)
