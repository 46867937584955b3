"""A model's weights as decoding wants them: a layer each, products that read the same input in one, cast once.

Each device holds rows of every matrix, and what it computes of an output is gathered: a token's activations travel,
weights never do.

Shapes: D embed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tlite_jax.config import ModelConfig
from tlite_jax.model.decoder import ParamSpec, param_specs
from tlite_jax.sharding import SHARDS, num_shards, partition_specs


class Layer(NamedTuple):
    """One block; norms are whole on every device, all else is this device's rows."""

    attention_norm: jax.Array
    query_key_value: jax.Array
    query_key_value_bias: jax.Array | None
    output: jax.Array
    output_bias: jax.Array | None
    mlp_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array


class Weights(NamedTuple):
    """All of a model."""

    embedding: jax.Array
    layers: tuple[Layer, ...]
    final_norm: jax.Array
    head: jax.Array


def weight_specs(model: ModelConfig, mesh: Mesh) -> Any:
    """The PartitionSpec of every array of `Weights`: rows over the shards, norms whole."""
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32),
        param_specs(model),
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
    arranged = jax.eval_shape(lambda params: _arrange(model, params, whole=lambda norm_D: norm_D), params)

    def spec(path: Any, _: Any) -> PartitionSpec:
        return PartitionSpec() if path[-1].name.endswith("norm") else PartitionSpec(SHARDS)

    return jax.tree_util.tree_map_with_path(spec, arranged, is_leaf=lambda leaf: type(leaf) is tuple)


def make_arrange(model: ModelConfig, mesh: Mesh, dtype: str) -> Callable[[Any], Weights]:
    """A compiled function from stored, sharded parameters to weights in the compute dtype."""

    def whole(norm_D: jax.Array) -> jax.Array:
        if num_shards(mesh) == 1:
            return norm_D
        return jax.lax.all_gather(norm_D, SHARDS, tiled=True)[: model.hidden_size]

    def local(params: Any) -> Weights:
        return _arrange(model, jax.tree.map(lambda x: x.astype(dtype), params), whole)

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(partition_specs(param_specs(model)),),
            out_specs=weight_specs(model, mesh),
            check_vma=False,
        )
    )


def _arrange(model: ModelConfig, params: Any, whole: Callable[[jax.Array], jax.Array]) -> Weights:
    blocks = params["blocks"]

    def layer(number: int) -> Layer:
        def part(name: str) -> jax.Array:
            return blocks[name][number]

        def fused(*names: str) -> jax.Array:
            return jnp.concatenate([part(name) for name in names])

        biased = model.attention_bias
        return Layer(
            attention_norm=whole(part("attention_norm")),
            query_key_value=fused("query", "key", "value"),
            query_key_value_bias=fused("query_bias", "key_bias", "value_bias") if biased else None,
            output=part("output"),
            output_bias=part("output_bias") if biased else None,
            mlp_norm=whole(part("mlp_norm")),
            gate_up=fused("gate", "up"),
            down=part("down"),
        )

    head = params["embedding" if model.tie_word_embeddings else "head"]
    layers = tuple(layer(number) for number in range(model.num_hidden_layers))
    return Weights(params["embedding"], layers, whole(params["final_norm"]), head)
