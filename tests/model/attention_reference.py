"""Attention in float64 and what to compare with it."""

import math
from functools import partial

import jax
import jax.extend
import numpy as np
from helpers import QUICK


def inputs(*, length, heads, kv_heads, documents, seed=0, rows=2, head_dim=6):
    rng = np.random.default_rng(seed)
    q, upstream = (rng.normal(size=(rows, length, heads, head_dim)) for _ in range(2))
    k, v = (rng.normal(size=(rows, length, kv_heads, head_dim)) for _ in range(2))
    segments = None
    if documents:
        starts = rng.random((rows, length)) < 0.15
        segments = np.cumsum(starts, axis=1, dtype=np.int32) + 1
        segments[:, length - length // 7 :] = 0
    return q, k, v, segments, upstream


def reference(q, k, v, segments, upstream):
    """Attention and its gradients in float64, a head at a time. Returns output, dq, dk, dv."""
    rows, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    output, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for row in range(rows):
        seen = np.tril(np.ones((length, length), bool))
        if segments is not None:
            seen &= segments[row][:, None] == segments[row][None, :]
        for head in range(heads):
            keys, values = k[row, :, head // group], v[row, :, head // group]
            scores = np.where(seen, q[row, :, head] @ keys.T / np.sqrt(head_dim), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            output[row, :, head] = weights @ values
            d_output = upstream[row, :, head]
            d_weights = d_output @ values.T
            d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=1, keepdims=True)) / np.sqrt(head_dim)
            dq[row, :, head] = d_scores @ keys
            dk[row, :, head // group] += d_scores.T @ q[row, :, head]
            dv[row, :, head // group] += weights.T @ d_output
    return output, dq, dk, dv


@partial(jax.jit, static_argnames="attend", compiler_options=QUICK)
def with_gradients(attend, q, k, v, segments, upstream):
    output, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
    return output, *pullback(upstream)


def matmul_flops(jaxpr):
    """FLOPs of all products in a program whose only loops are scans."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "while"
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[dim] for dim in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += times * matmul_flops(getattr(inner, "jaxpr", inner))
    return total
