"""Zeros come into being after a value does."""

import jax
import jax.numpy as jnp
import numpy as np

from tlite_jax.zeros import zeros_after


def test_zeros_wait_for_the_value():
    shapes = {"sums": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "counts": [jax.ShapeDtypeStruct((4,), jnp.int32)]}
    given = jnp.arange(5.0)
    value, zeros = zeros_after(given, shapes)
    np.testing.assert_array_equal(value, given)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), zeros) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))
    # What makes the zeros reads the value, though only they are returned.
    program = jax.jit(lambda x: zeros_after(x, shapes)[1]).lower(given).as_text()
    assert "optimization_barrier %arg0" in program
