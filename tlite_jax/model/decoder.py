"""The Llama decoder in Flax NNX, written for one device; hooks connect it to the world.

`gather` turns a stored part of the model into one to compute with (cast it, and on a mesh collect it from its
shards), inside the rematerialised block, so that at most a block or two exist whole. `attend` is the attention,
`product` how a block's matrices are multiplied.

Shapes: B batch, T tokens, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tlite_jax.config import ModelConfig
from tlite_jax.model import attention
from tlite_jax.model.attention import Attend
from tlite_jax.model.layers import (
    Product,
    apply_rope,
    linear,
    product,
    rms_norm,
    rope_frequencies,
    rope_tables,
    swiglu,
)

Params = dict[str, Any]  # nested dict of arrays; see `param_specs`
PartT = TypeVar("PartT")
Gather = Callable[[PartT], PartT]  # on an nnx.Param or a Block


def _identity(part: PartT) -> PartT:
    return part


def logical_axes(config: ModelConfig) -> dict[str, int]:
    """The size of each logical axis that parameters are laid out along."""
    return {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_attention_heads * config.head_dim,
        "kv_heads": config.num_key_value_heads * config.head_dim,
        "mlp": config.intermediate_size,
    }


def rope_at(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotation tables of the given positions."""
    return rope_tables(positions_BT, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))


class _Initializer:
    """Makes float32 parameters: matrices normal(0, initializer_range), norms 1, biases 0, as transformers does."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self._sizes = logical_axes(config)
        self._range = config.initializer_range
        self._rngs = rngs

    def matrix(self, *axes: str) -> nnx.Param:
        shape = tuple(self._sizes[axis] for axis in axes)
        return nnx.Param(self._range * jax.random.normal(self._rngs.params(), shape, jnp.float32), axes=axes)

    def constant(self, axis: str, value: float) -> nnx.Param:
        return nnx.Param(jnp.full(self._sizes[axis], value, jnp.float32), axes=(axis,))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Weights are [out, in], as in Hugging Face checkpoints."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        init = _Initializer(config, rngs)
        self.config = config
        self.attention_norm = init.constant("embed", 1.0)
        self.query = init.matrix("heads", "embed")
        self.key = init.matrix("kv_heads", "embed")
        self.value = init.matrix("kv_heads", "embed")
        self.output = init.matrix("embed", "heads")
        if config.attention_bias:
            self.query_bias = init.constant("heads", 0.0)
            self.key_bias = init.constant("kv_heads", 0.0)
            self.value_bias = init.constant("kv_heads", 0.0)
            self.output_bias = init.constant("embed", 0.0)
        self.mlp_norm = init.constant("embed", 1.0)
        self.gate = init.matrix("mlp", "embed")
        self.up = init.matrix("mlp", "embed")
        self.down = init.matrix("embed", "mlp")

    def project(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], *, product: Product = product
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, N, H] and keys [B, T, K, H], and values [B, T, K, H]."""
        B, T, _ = x_BTD.shape
        normed_BTD = rms_norm(x_BTD, self.attention_norm[...], self.config.rms_norm_eps)

        def heads(name: str) -> jax.Array:
            bias = getattr(self, f"{name}_bias")[...] if self.config.attention_bias else None
            y = linear(normed_BTD, getattr(self, name)[...], bias, product=product)
            return y.reshape(B, T, -1, self.config.head_dim)

        return apply_rope(heads("query"), rope), apply_rope(heads("key"), rope), heads("value")

    def finish(self, x_BTD: jax.Array, attended_BTNH: jax.Array, *, product: Product = product) -> jax.Array:
        """Everything after attention: its output projection, the residual and the MLP. Returns [B, T, D]."""
        B, T, _ = x_BTD.shape
        bias = self.output_bias[...] if self.config.attention_bias else None
        with jax.named_scope("attention"):
            x_BTD = x_BTD + linear(attended_BTNH.reshape(B, T, -1), self.output[...], bias, product=product)
        with jax.named_scope("mlp"):
            normed_BTD = rms_norm(x_BTD, self.mlp_norm[...], self.config.rms_norm_eps)
            return x_BTD + swiglu(normed_BTD, self.gate[...], self.up[...], self.down[...], product=product)

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids_BT: jax.Array | None,
        *,
        attend: Attend,
        product: Product = product,
    ) -> jax.Array:
        """Returns [B, T, D]."""
        with jax.named_scope("attention"):
            q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, rope, product=product)
            attended_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        return self.finish(x_BTD, attended_BTNH, product=product)


class Decoder(nnx.Module):
    """A Llama-family language model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        init = _Initializer(config, rngs)
        self.config = config
        self.embedding = init.matrix("vocab", "embed")
        make_blocks = nnx.vmap(lambda keys: Block(config, rngs=keys))
        self.blocks = make_blocks(rngs.split(config.num_hidden_layers))
        self.final_norm = init.constant("embed", 1.0)
        if not config.tie_word_embeddings:
            self.head = init.matrix("vocab", "embed")

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        *,
        positions_BT: jax.Array | None = None,
        gather: Gather = _identity,
        attend: Attend = attention.xla,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the model up to, but not including, the product with the head.

        Args:
          tokens_BT: [B, T] int32.
          segment_ids_BT: [B, T] int32 or None; attention stays inside equal ids.
          positions_BT: [B, T] int32, what RoPE rotates by; None: 0, 1, 2, ... in every row.
          gather: makes a Block or an nnx.Param ready to compute with.
          attend: the attention.

        Returns:
          The normed hidden states [B, T, D] and the head [V, D], both in the dtype that `gather` gives;
          logits are `linear(hidden, head)`.
        """
        embedding = gather(self.embedding)
        rope = rope_at(self.config, jnp.arange(tokens_BT.shape[1])[None] if positions_BT is None else positions_BT)

        def body(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return gather(block)(x_BTD, rope, segment_ids_BT, attend=attend), None

        x_BTD, _ = jax.lax.scan(body, embedding[...][tokens_BT], self.blocks)
        hidden_BTD = rms_norm(x_BTD, gather(self.final_norm)[...], self.config.rms_norm_eps)
        head = embedding if self.config.tie_word_embeddings else gather(self.head)
        return hidden_BTD, head[...]


@dataclass(frozen=True)
class ParamSpec:
    """A parameter's logical shape, and the logical axes of its last dims (a leading dim, if any, stacks the layers)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def sharded_dim(self) -> int:
        """The dim that is split over the mesh: the first one that is not the stack of layers."""
        return len(self.shape) - len(self.axes)


def _abstract(config: ModelConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def graphdef(config: ModelConfig) -> nnx.GraphDef:
    """The decoder without its parameters: `nnx.merge(graphdef(config), params)` is a Decoder."""
    return nnx.split(_abstract(config), nnx.Param)[0]


def block_graphdef(config: ModelConfig) -> nnx.GraphDef:
    """One Block without its parameters: `nnx.merge(block_graphdef(config), weights)` is a Block."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))), nnx.Param)[0]


def block_specs(config: ModelConfig) -> dict[str, Any]:
    """The ParamSpecs of one Block's parameters, without the dim that stacks the layers."""
    stacked = param_specs(config)["blocks"]
    return {name: ParamSpec(spec.shape[1:], spec.axes) for name, spec in stacked.items()}


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """The nested dict of every parameter's ParamSpec; no memory is allocated."""
    state = nnx.split(_abstract(config), nnx.Param)[1]
    specs = jax.tree.map(
        lambda param: ParamSpec(tuple(param.get_value().shape), param.axes),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )
    return nnx.to_pure_dict(specs)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random float32 parameters of logical shape; the same seed gives the same bits on any mesh."""
    model = Decoder(config, rngs=nnx.Rngs(params=jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
