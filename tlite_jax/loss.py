"""Cross-entropy over a large vocabulary: sums and counts, never means.

Shapes: B batch, T tokens, D embed, V vocab, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from tlite_jax.model.layers import linear

IGNORED = -1  # a target that is not scored


def token_losses(hidden: jax.Array, head_VD: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats, float32, 0 where the target is IGNORED.

    Args:
      hidden: [..., D].
      head_VD: [V, D], same dtype.
      targets: [...] int32.
    """
    logits = linear(hidden, head_VD).astype(jnp.float32)
    scored = targets != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(scored, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)


def cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy and the number of scored tokens, with the logits of `chunk_tokens` tokens at a time.

    The backward pass computes a chunk's logits again instead of keeping them.

    Args:
      hidden_BTD: [B, T, D].
      head_VD: [V, D].
      targets_BT: [B, T] int32; IGNORED is not scored.
      chunk_tokens: upper bound of the tokens whose logits exist at once.

    Returns:
      (sum in nats, count), two float32 scalars.
    """
    D = hidden_BTD.shape[-1]
    hidden_ND, targets_N = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1)
    count = jnp.sum(targets_N != IGNORED, dtype=jnp.float32)
    tokens = targets_N.shape[0]
    if tokens <= chunk_tokens:
        return jnp.sum(token_losses(hidden_ND, head_VD, targets_N)), count
    num_chunks = -(-tokens // chunk_tokens)
    chunk = -(-tokens // num_chunks)
    padding = num_chunks * chunk - tokens
    hidden_ND = jnp.pad(hidden_ND, ((0, padding), (0, 0)))
    targets_N = jnp.pad(targets_N, (0, padding), constant_values=IGNORED)

    def body(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C = part
        return total + jnp.sum(token_losses(hidden_CD, head_VD, targets_C)), None

    parts = hidden_ND.reshape(num_chunks, chunk, D), targets_N.reshape(num_chunks, chunk)
    total, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), jnp.float32(0), parts)
    return total, count
