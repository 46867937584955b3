"""Zeros to add to, or to write into, that take memory no earlier than they are needed."""

from typing import Any

import jax
import jax.numpy as jnp


def zeros_after(value: Any, shapes: Any) -> tuple[Any, Any]:
    """A value as it is, and arrays of zeros that exist only once the value does.

    Zeros depend on nothing, so that XLA may write them as a program begins, and share one buffer between uses that
    are far apart: activations of a loop's last step then take memory while the first ones run.

    Args:
      value: arrays.
      shapes: a tree of `jax.ShapeDtypeStruct`.

    Returns:
      The value, and zeros in the structure of `shapes`. What follows must read this value for the order to hold.
    """
    value, zero = jax.lax.optimization_barrier((value, jnp.float32(0)))
    return value, jax.tree.map(lambda of: jnp.broadcast_to(zero.astype(of.dtype), of.shape), shapes)
