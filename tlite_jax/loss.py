"""Cross-entropy over a large vocabulary: sums and counts, never means.

Shapes: B batch, T tokens, D embed, V vocab, M = B T, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from tlite_jax.model.layers import linear

IGNORED = -1  # a target that is not scored


def token_losses(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int) -> jax.Array:
    """-log p(target) of every token, with the logits of at most `chunk_tokens` tokens at a time.

    The backward pass computes a chunk's logits again instead of keeping them.

    Args:
      hidden_BTD: [B, T, D].
      head_VD: [V, D], same dtype.
      targets_BT: [B, T] int32.
      chunk_tokens: upper bound of the tokens whose logits exist at once.

    Returns:
      [B, T] float32 nats, 0 where the target is IGNORED.
    """
    D = hidden_BTD.shape[-1]
    hidden_MD, targets_M = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1)
    tokens = targets_M.shape[0]
    num_chunks = -(-tokens // chunk_tokens)
    if num_chunks == 1:
        return _losses(hidden_MD, head_VD, targets_M).reshape(targets_BT.shape)
    chunk = -(-tokens // num_chunks)
    padding = num_chunks * chunk - tokens
    hidden_MD = jnp.pad(hidden_MD, ((0, padding), (0, 0)))
    targets_M = jnp.pad(targets_M, (0, padding), constant_values=IGNORED)

    def body(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, _losses(part[0], head_VD, part[1])

    parts = hidden_MD.reshape(num_chunks, chunk, D), targets_M.reshape(num_chunks, chunk)
    _, losses = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, parts)
    return losses.reshape(-1)[:tokens].reshape(targets_BT.shape)


def cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (summed loss in nats, scored tokens), two float32 scalars; arguments as for `token_losses`."""
    losses_BT = token_losses(hidden_BTD, head_VD, targets_BT, chunk_tokens=chunk_tokens)
    return jnp.sum(losses_BT), jnp.sum(targets_BT != IGNORED, dtype=jnp.float32)


def _losses(hidden_CD: jax.Array, head_VD: jax.Array, targets_C: jax.Array) -> jax.Array:
    logits_CV = linear(hidden_CD, head_VD).astype(jnp.float32)
    scored = targets_C != IGNORED
    chosen = jnp.take_along_axis(logits_CV, jnp.where(scored, targets_C, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(scored, jax.nn.logsumexp(logits_CV, axis=-1) - chosen, 0.0)
