from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from tlite_jax.model import attention

CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention, "LARGEST_CHUNK", CHUNK)


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


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("backend", "length", "heads", "kv_heads"),
    [("xla", 41, 6, 2), ("xla_chunked", 41, 6, 2), ("xla_chunked", 48, 3, 3), ("xla_chunked", 11, 4, 1)],
)
def test_output_and_gradients_equal_float64(backend, length, heads, kv_heads, documents):
    arrays = inputs(length=length, heads=heads, kv_heads=kv_heads, documents=documents)
    expected = reference(*arrays)
    q, k, v, segments, upstream = arrays
    cast = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    actual = with_gradients(
        attention.BACKENDS[backend], *cast, None if segments is None else jnp.asarray(segments), jnp.float32(upstream)
    )
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=3e-6, rtol=0, err_msg=name)


def test_bfloat16_sums_in_float32():
    """Weights are rounded to bfloat16 before the product with the values: 2^-8 a term, and the output once more."""
    q, k, v, segments, upstream = inputs(length=41, heads=4, kv_heads=2, documents=True)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    exact = reference(*(np.asarray(x, np.float64) for x in half), segments, upstream)[0]
    for attend in (attention.xla, attention.xla_chunked):
        ours = quick_jit(attend)(*half, jnp.asarray(segments))
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=2**-7 * np.max(np.abs(v)), rtol=0)


def test_chunked_attention_never_holds_all_scores():
    """The largest array, forward and backward, is a chunk of queries over the keys."""
    length = 8 * CHUNK
    q, k, v, _, upstream = inputs(length=length, heads=2, kv_heads=1, documents=False)

    def largest(attend):
        jaxpr = jax.make_jaxpr(partial(with_gradients.__wrapped__, attend))(q, k, v, None, upstream)
        return max(aval.size for aval in _values(jaxpr.jaxpr))

    assert largest(attention.xla) == 2 * 2 * length * length
    assert largest(attention.xla_chunked) == 2 * 2 * CHUNK * length


def _values(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _values(inner)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    changed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_a_token_reaches_only_later_tokens_of_its_document(sizes, changed):
    length = 40
    segments = np.concatenate([np.full(size, number) for number, size in enumerate(sizes, start=1)])[:length]
    segments = np.pad(segments, (0, length - len(segments))).astype(np.int32)[None]
    q, k, v, _, _ = inputs(length=length, heads=2, kv_heads=1, documents=False, rows=1)
    position = changed % length
    other_key, other_value = k.copy(), v.copy()
    other_key[0, position] += 5.0
    other_value[0, position] += 5.0
    before = compiled_attention(q, k, v, segments)
    difference = np.abs(compiled_attention(q, other_key, other_value, segments) - before).max(axis=(0, 2, 3))
    reached = (np.arange(length) >= position) & (segments[0] == segments[0, position])
    assert np.all(difference[~reached] == 0)
    difference = np.abs(compiled_attention(q, k, other_value, segments) - before).max(axis=(0, 2, 3))
    assert np.all(difference[reached] > 0)


@quick_jit
def compiled_attention(q, k, v, segments):
    return attention.xla_chunked(q, k, v, segments)


def test_auto_takes_cudnn_only_where_it_works():
    def select(platform, dtype, masking):
        return attention.select("auto", platform=platform, dtype=dtype, document_masking=masking)

    assert select("gpu", "bfloat16", False) is attention.cudnn
    assert select("cuda", "bfloat16", False) is attention.cudnn
    assert select("gpu", "float32", False) is attention.xla_chunked
    assert select("gpu", "bfloat16", True) is attention.xla_chunked
    assert select("cpu", "bfloat16", False) is attention.xla_chunked
    assert select("tpu", "bfloat16", False) is attention.xla_chunked
    for name, backend in attention.BACKENDS.items():
        chosen = attention.select(name, platform="cpu", dtype="float32", document_masking=True)
        assert chosen is backend


def test_cudnn_refuses_document_masks_and_names_the_mend():
    q, k, v, segments, _ = inputs(length=8, heads=2, kv_heads=1, documents=True)
    with pytest.raises(ValueError, match="use xla_chunked or auto"):
        attention.cudnn(q, k, v, segments)
