"""Causal grouped-query attention: one call, several backends.

Shapes: B batch, T query tokens, S key tokens, N heads, K kv heads, G = N / K, H head_dim.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

# Queries of a block in `xla_chunked`. Small blocks skip more of the future; many of them are slow to compile.
SMALLEST_CHUNK, LARGEST_CHUNK, MOST_CHUNKS = 128, 512, 16


class Attend(Protocol):
    """The hook through which the model attends."""

    def __call__(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
    ) -> jax.Array:
        """Returns [B, T, N, H]; query t sees keys s <= t of its own segment (of all, when segment ids are None)."""


def xla(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Plain attention with the whole T x T matrix of scores; softmax in float32."""
    return _attend_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, segment_ids_BT, first_row=0)


def xla_chunked(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The same, a block of queries at a time and recomputed in the backward pass: memory grows as T, not T^2."""
    length = q_BTNH.shape[1]
    chunk = min(max(SMALLEST_CHUNK, length // MOST_CHUNKS), LARGEST_CHUNK)
    if length <= chunk:
        return xla(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    blocks = []
    # A Python loop, so that each block reads only the keys before its end: half of the products.
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        rows, keys = slice(start, stop), slice(0, stop)
        segments = (None, None) if segment_ids_BT is None else (segment_ids_BT[:, rows], segment_ids_BT[:, keys])
        block = jax.checkpoint(partial(_attend_rows, first_row=start), prevent_cse=False)
        blocks.append(block(q_BTNH[:, rows], k_BTKH[:, keys], v_BTKH[:, keys], *segments))
    return jnp.concatenate(blocks, axis=1)


def cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """CuDNN's fused causal attention (Ampere and later, bf16); it has no document masks here."""
    if segment_ids_BT is not None:
        raise ValueError("execution.attention=cudnn has no document masks; use xla_chunked or auto")
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")


BACKENDS: dict[str, Attend] = {"xla": xla, "xla_chunked": xla_chunked, "cudnn": cudnn}


def select(name: str, *, platform: str, dtype: str, document_masking: bool) -> Attend:
    """The backend for `execution.attention`; "auto" takes the fastest that has the mask and runs on the platform."""
    if name != "auto":
        return BACKENDS[name]
    if platform in ("gpu", "cuda") and dtype == "bfloat16" and not document_masking:
        return cudnn
    return xla_chunked


def _attend_rows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    *,
    first_row: int,
) -> jax.Array:
    """Attention of queries first_row.. over keys 0..S."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    mask_BTS = (jnp.arange(first_row, first_row + T)[:, None] >= jnp.arange(S)[None, :])[None]
    if query_segments_BT is not None and key_segments_BS is not None:
        mask_BTS = mask_BTS & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def masked_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention under a boolean mask of [B or 1, T, S]; softmax in float32. Returns [B, T, N, H].

    The products have one batch dim (b k) and rows (g t): a CPU then runs them as large matrix products.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    q = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
    k = k_BSKH.transpose(0, 2, 1, 3).reshape(B * K, S, H)
    v = v_BSKH.transpose(0, 2, 1, 3).reshape(B * K, S, H)
    mask = jnp.broadcast_to(mask_BTS[:, None, None], (B, K, G, T, S)).reshape(B * K, G * T, S)
    scores = jnp.einsum("xth,xsh->xts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
    attended = jnp.einsum("xts,xsh->xth", weights.astype(v.dtype), v)
    return attended.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
