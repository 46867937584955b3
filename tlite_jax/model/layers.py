"""The parts of a Llama block that are not attention.

Shapes: B batch, T tokens, D embed, N heads, H head_dim, F mlp.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tlite_jax.config import Llama3RopeScaling


@jax.custom_vjp
def product(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """The product x [..., I] @ weight^T: [..., O] in x's dtype, accumulated in float32."""
    return jnp.einsum("...i,oi->...o", x, weight_OI)


def _product_forward(x: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not a call of product: that would hide its dot_general from rematerialisation policies.
    return jnp.einsum("...i,oi->...o", x, weight_OI), (x, weight_OI)


def _product_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_OI = residuals
    # Both products read dy. Without the barrier a CPU program computes it once for each, the second time transposed
    # in an elementwise loop: 1.5x the time of a SwiGLU's backward pass.
    dy = jax.lax.optimization_barrier(dy)
    dx = jnp.einsum("...o,oi->...i", dy, weight_OI)
    return dx, jnp.einsum("mo,mi->oi", dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))


product.defvjp(_product_forward, _product_backward)

Product = Callable[[jax.Array, jax.Array], jax.Array]  # `product`, or one like it


def linear(
    x: jax.Array, weight_OI: jax.Array, bias_O: jax.Array | None = None, *, product: Product = product
) -> jax.Array:
    """The product x @ weight^T (+ bias), with the weight in Hugging Face's layout.

    Args:
      x: [..., I].
      weight_OI: [O, I], same dtype as x.
      bias_O: [O] or None.
      product: how matrices are multiplied.

    Returns:
      [..., O] in x's dtype; products are accumulated in float32.
    """
    y = product(x, weight_OI)
    return y if bias_O is None else y + bias_O


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation in float32 (Zhang & Sennrich 2019; transformers' LlamaRMSNorm).

    Returns:
      [B, T, D] in x's dtype.
    """
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + eps)
    return (x32_BTD * inverse_BT1).astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)


def swiglu(
    x_BTD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array, *, product: Product = product
) -> jax.Array:
    """down(silu(gate x) * up x) (Shazeer 2020). Returns [B, T, D]."""
    return product(jax.nn.silu(product(x_BTD, gate_FD)) * product(x_BTD, up_FD), down_DF)


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3RopeScaling | None) -> np.ndarray:
    """Inverse frequencies of rotary position embedding, plain or scaled as in Llama 3.1.

    Follows transformers' `_compute_llama3_parameters`: long waves are slowed by `factor`, short ones are left
    alone, those between are interpolated.

    Returns:
      [H / 2] float32, radians a position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A correctly rounded power, then a float32 division: bit for bit what torch computes.
    powers = np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / span
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = np.where(wavelengths > longest, frequencies / scaling.factor, blended)
    return np.where(wavelengths < shortest, frequencies, slowed).astype(np.float32)


def rope_tables(positions_BT: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's rotation angles: two [B, T, 1, H / 2] float32 arrays."""
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + H/2), Hugging Face's half-split layout. Computed in float32; returns x's dtype."""
    cosine, sine = tables
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTNH.dtype)
