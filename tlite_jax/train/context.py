"""Context parallelism: a sequence split over the devices of the mesh's `context` axis.

Everything but attention works on tokens one by one. Attention exchanges tokens for heads with one all-to-all each way
(DeepSpeed-Ulysses, arXiv 2309.14509): a device then attends over the whole sequence, with any kernel and any mask,
for its share of the heads.

Shapes: B batch, T tokens of the sequence, C devices of the axis, N heads, K kv heads, H head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.model.attention import Attend
from tlite_jax.sharding import CONTEXT


def check_context(model: ModelConfig, num_context: int, sequence_length: int) -> None:
    """Raises UserError when heads or tokens cannot be dealt out over the context axis; names what can."""
    heads = model.num_key_value_heads
    if heads % num_context:
        fits = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(f"mesh.context {num_context} does not divide the model's {heads} kv heads; use one of {fits}")
    if sequence_length % num_context:
        raise UserError(
            f"mesh.context {num_context} does not divide data.sequence_length {sequence_length}; change one of them"
        )


def local_positions(num_tokens: int) -> jax.Array:
    """Positions in the sequence of the tokens that this device holds, [num_tokens] int32; under shard_map."""
    return jax.lax.axis_index(CONTEXT) * num_tokens + jnp.arange(num_tokens)


def across_context(attend: Attend, num_context: int) -> Attend:
    """Attention over whole sequences of which each device holds [B, T / C, N, H]; under shard_map."""
    if num_context == 1:
        return attend
    gather_tokens = partial(jax.lax.all_to_all, axis_name=CONTEXT, split_axis=2, concat_axis=1, tiled=True)
    gather_heads = partial(jax.lax.all_to_all, axis_name=CONTEXT, split_axis=1, concat_axis=2, tiled=True)

    def attend_across(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
    ) -> jax.Array:
        if segment_ids_BT is not None:
            segment_ids_BT = jax.lax.all_gather(segment_ids_BT, CONTEXT, axis=1, tiled=True)
        return gather_heads(attend(gather_tokens(q_BTNH), gather_tokens(k_BTKH), gather_tokens(v_BTKH), segment_ids_BT))

    return attend_across
