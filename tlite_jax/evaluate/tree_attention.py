"""Attention for rows that hold trees (`evaluate.packing`): query t sees key s when s <= t < end(s).

Shapes: B rows, T tokens of a row, N heads, K kv heads, H head_dim, C queries at a time.
"""

import jax
import jax.numpy as jnp

from tlite_jax.model.attention import Attend, masked_attention

CHUNK = 128  # queries whose scores exist at once


def tree_attention(ends_BT: jax.Array) -> Attend:
    """The model's `attend` hook for rows whose tokens' subtrees end at `ends_BT` ([B, T] int32)."""

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
        del segment_ids_BT
        B, T, N, H = q_BTNH.shape
        chunk = CHUNK if T % CHUNK == 0 else T

        def rows(first: jax.Array) -> jax.Array:
            queries = first + jnp.arange(chunk)
            mask_BCT = (jnp.arange(T) <= queries[:, None]) & (queries[:, None] < ends_BT[:, None, :])
            # A place that holds no token sees itself, so that its softmax is finite.
            mask_BCT |= jnp.arange(T) == queries[:, None]
            q_BCNH = jax.lax.dynamic_slice_in_dim(q_BTNH, first, chunk, axis=1)
            return masked_attention(q_BCNH, k_BTKH, v_BTKH, mask_BCT)

        attended = jax.lax.map(rows, jnp.arange(0, T, chunk))
        return jnp.moveaxis(attended, 0, 1).reshape(B, T, N, H)

    return attend
