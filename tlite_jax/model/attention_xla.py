"""Attention in plain XLA: with the whole matrix of scores, or a block of queries at a time. It runs everywhere.

Shapes: B batch, T query tokens, S key tokens, N heads, K kv heads, G = N / K, H head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tlite_jax.model.attention_remat import ATTENDED

CHUNK = 128  # queries whose scores exist at once in `xla_chunked`
MOST_SPANS = 8  # each span reads the keys before its end: 1 / 2 + 1 / 16 of all products; each is compiled anew


def xla(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Plain attention with the whole T x T matrix of scores; softmax in float32."""
    attended_BTNH = _attend_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, segment_ids_BT, first_row=0)
    return checkpoint_name(attended_BTNH, ATTENDED)


def spans(length: int) -> list[tuple[int, int]]:
    """The first and the last query (exclusive) of each span of `xla_chunked`: whole chunks, or the rest, shorter."""
    whole = length // CHUNK
    chunks = max(1, -(-whole // MOST_SPANS))
    bounds = [(start * CHUNK, min(start + chunks, whole) * CHUNK) for start in range(0, whole, chunks)]
    return bounds if length % CHUNK == 0 else [*bounds, (whole * CHUNK, length)]


def xla_chunked(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The same, a chunk of queries at a time and recomputed in the backward pass: memory grows as T, not T^2.

    Chunks of a span run one after the other, in a scan. Gradients of k and v are summed over chunks in float32.
    """
    length = q_BTNH.shape[1]
    if length <= CHUNK:
        return xla(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    keys_BTKH, values_BTKH = (x.astype(jnp.float32) for x in (k_BTKH, v_BTKH))
    attended = []
    # A Python loop, as the keys that a span reads are of a size of its own.
    for start, stop in spans(length):
        segments_BT = None if segment_ids_BT is None else segment_ids_BT[:, :stop]
        attended.append(_attend_span(q_BTNH[:, start:stop], keys_BTKH[:, :stop], values_BTKH[:, :stop], segments_BT))
    return checkpoint_name(jnp.concatenate(attended, axis=1), ATTENDED)


def _attend_span(
    q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, segment_ids_BS: jax.Array | None
) -> jax.Array:
    """Attention of the last T tokens of S, a chunk at a time; keys and values are float32. Returns [B, T, N, H]."""
    B, T, N, H = q_BTNH.shape
    S = keys_BSKH.shape[1]

    @partial(jax.checkpoint, prevent_cse=False)
    def attend_chunk(q_BCNH: jax.Array, query_segments_BC: jax.Array | None, first_row: int | jax.Array) -> jax.Array:
        k_BSKH, v_BSKH = (x.astype(q_BTNH.dtype) for x in (keys_BSKH, values_BSKH))
        return _attend_rows(q_BCNH, k_BSKH, v_BSKH, query_segments_BC, segment_ids_BS, first_row=first_row)

    query_segments_BT = None if segment_ids_BS is None else segment_ids_BS[:, S - T :]
    if T <= CHUNK:
        return attend_chunk(q_BTNH, query_segments_BT, S - T)

    def chunks_first(x_BT: jax.Array | None) -> jax.Array | None:
        return None if x_BT is None else jnp.moveaxis(x_BT.reshape(B, -1, CHUNK, *x_BT.shape[2:]), 1, 0)

    chunks = chunks_first(q_BTNH), chunks_first(query_segments_BT), jnp.arange(S - T, S, CHUNK)
    _, attended = jax.lax.scan(lambda carry, chunk: (carry, attend_chunk(*chunk)), None, chunks)
    return jnp.moveaxis(attended, 0, 1).reshape(B, T, N, H)


def _attend_rows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    *,
    first_row: int | jax.Array,
) -> jax.Array:
    """Attention of queries first_row.. over keys 0..S."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    mask_BTS = ((first_row + jnp.arange(T))[:, None] >= jnp.arange(S)[None, :])[None]
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


def is_kernel(primitive, params) -> bool:
    return False
