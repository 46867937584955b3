"""Cross-entropy over a large vocabulary: sums and counts, never means.

Shapes: B batch, T tokens, D embed, V vocab, N chunks, C tokens of a chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tlite_jax.model.layers import linear
from tlite_jax.zeros import zeros_after

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
    hidden_NCD, targets_NC = _chunks(hidden_BTD, targets_BT, chunk_tokens)

    def body(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        logits_CV = linear(part[0], head_VD).astype(jnp.float32)
        return None, _chosen_losses(logits_CV, jax.nn.logsumexp(logits_CV, axis=-1), part[1])

    _, losses_NC = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, (hidden_NCD, targets_NC))
    return losses_NC.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape)


def cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and number of scored tokens.

    Args:
      hidden_BTD, head_VD, targets_BT, chunk_tokens: as for `token_losses`.

    Returns:
      (sum in nats, count), two float32 scalars.
    """
    return jnp.sum(token_losses(hidden_BTD, head_VD, targets_BT, chunk_tokens=chunk_tokens)), num_scored(targets_BT)


def cross_entropy_and_gradients(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`token_losses` and the gradients of their sum, computed together, a chunk of logits at a time.

    So no logits are kept or computed again, and the head's gradient is summed over chunks in float32 (the idea of
    Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).

    Args:
      hidden_BTD, head_VD, targets_BT, chunk_tokens: as for `token_losses`.

    Returns:
      [B, T] float32 nats, 0 where the target is IGNORED, and the gradients of hidden [B, T, D], in its dtype, and of
      the head [V, D], float32.
    """
    hidden_NCD, targets_NC = _chunks(hidden_BTD, targets_BT, chunk_tokens)

    def body(dhead_VD: jax.Array, part: tuple[jax.Array, jax.Array]) -> Any:
        hidden_CD, targets_C = part
        logits_CV = linear(hidden_CD, head_VD).astype(jnp.float32)
        total_C = jax.nn.logsumexp(logits_CV, axis=-1)
        losses_C = _chosen_losses(logits_CV, total_C, targets_C)
        wanted_CV = jnp.arange(logits_CV.shape[1]) == targets_C[:, None]
        scored_C1 = (targets_C != IGNORED)[:, None]
        dlogits_CV = jnp.where(scored_C1, jnp.exp(logits_CV - total_C[:, None]) - wanted_CV, 0.0).astype(head_VD.dtype)
        dhead_VD += jnp.einsum("cv,cd->vd", dlogits_CV, hidden_CD, preferred_element_type=jnp.float32)
        return dhead_VD, (losses_C, jnp.einsum("cv,vd->cd", dlogits_CV, head_VD))

    hidden_NCD, zeros = zeros_after(hidden_NCD, jax.ShapeDtypeStruct(head_VD.shape, jnp.float32))
    dhead_VD, (losses_NC, dhidden_NCD) = jax.lax.scan(body, zeros, (hidden_NCD, targets_NC))
    losses_BT = losses_NC.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape)
    dhidden_BTD = dhidden_NCD.reshape(-1, hidden_BTD.shape[-1])[: targets_BT.size].reshape(hidden_BTD.shape)
    return losses_BT, (dhidden_BTD, dhead_VD)


def num_scored(targets_BT: jax.Array, axis: int | None = None) -> jax.Array:
    """How many targets are scored, float32: of all, or along an axis."""
    return jnp.sum(targets_BT != IGNORED, axis=axis, dtype=jnp.float32)


def _chunks(hidden_BTD: jax.Array, targets_BT: jax.Array, chunk_tokens: int) -> tuple[jax.Array, jax.Array]:
    """[N, C, D] hidden states and [N, C] targets, padded with IGNORED; chunks are as even as they can be."""
    tokens = targets_BT.size
    num_chunks = -(-tokens // chunk_tokens)
    chunk = -(-tokens // num_chunks)
    padding = num_chunks * chunk - tokens
    hidden = jnp.pad(hidden_BTD.reshape(tokens, -1), ((0, padding), (0, 0)))
    targets = jnp.pad(targets_BT.reshape(-1), (0, padding), constant_values=IGNORED)
    return hidden.reshape(num_chunks, chunk, -1), targets.reshape(num_chunks, chunk)


def _chosen_losses(logits_CV: jax.Array, total_C: jax.Array, targets_C: jax.Array) -> jax.Array:
    scored_C = targets_C != IGNORED
    chosen_C = jnp.take_along_axis(logits_CV, jnp.where(scored_C, targets_C, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(scored_C, total_C - chosen_C, 0.0)
