import sys
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import inputs, reference, with_gradients
from helpers import quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from tlite_jax.errors import UserError
from tlite_jax.model import attention, attention_xla

CHUNK, SPANS = 8, 2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention_xla, "CHUNK", CHUNK)
    monkeypatch.setattr(attention_xla, "MOST_SPANS", SPANS)


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
    length = 16 * CHUNK
    q, k, v, _, upstream = inputs(length=length, heads=2, kv_heads=1, documents=False)

    def largest(attend):
        jaxpr = jax.make_jaxpr(partial(with_gradients.__wrapped__, attend))(q, k, v, None, upstream)
        return max(aval.size for aval in _values(jaxpr.jaxpr))

    assert largest(attention.xla) == 2 * 2 * length * length
    assert largest(attention.xla_chunked) == 2 * 2 * CHUNK * length


def test_chunks_are_not_in_memory_at_once():
    def temporaries(attend, length):
        arrays = inputs(length=length, heads=2, kv_heads=1, documents=True, rows=1)
        return with_gradients.lower(attend, *arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(attention.xla_chunked, 1024) < 2.2 * temporaries(attention.xla_chunked, 512)
    assert temporaries(attention.xla, 1024) > 3.5 * temporaries(attention.xla, 512)


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


def select(name, platform, *, dtype="bfloat16", documents=False, **shape):
    return attention.select(name, platform=platform, dtype=dtype, document_masking=documents, **shape)


GPU = {"sequence_length": 8192, "head_dim": 128, "compute_capability": "8.0"}


@pytest.mark.parametrize(
    ("platform", "options", "expected"),
    [
        ("cuda", GPU, "cudnn"),
        ("gpu", {"documents": True, **GPU}, "pallas_triton"),
        ("cuda", {"documents": True, **GPU, "compute_capability": "9.0"}, "pallas_triton"),
        ("cuda", {"documents": True, **GPU, "sequence_length": 8200}, "xla_chunked"),
        ("cuda", {"documents": True, **GPU, "head_dim": 256}, "xla_chunked"),
        ("cuda", {"documents": True, **GPU, "compute_capability": "7.0"}, "xla_chunked"),
        ("cuda", {**GPU, "compute_capability": "7.0"}, "xla_chunked"),
        ("gpu", {**GPU, "compute_capability": "gfx942"}, "xla_chunked"),
        ("cuda", {"dtype": "float32", **GPU}, "xla_chunked"),
        ("cuda", {"dtype": "float32", "documents": True, **GPU}, "xla_chunked"),
        ("tpu", {"sequence_length": 8192}, "splash"),
        ("tpu", {"sequence_length": 8192, "documents": True}, "splash"),
        ("tpu", {"sequence_length": 8192, "dtype": "float32"}, "splash"),
        ("tpu", {"sequence_length": 8200, "documents": True}, "xla_chunked"),
        ("cpu", {"sequence_length": 8192, "documents": True}, "xla_chunked"),
        ("cpu", {"sequence_length": 8192}, "xla_chunked"),
        # What is not said: a shape is not relied on, a new enough GPU is.
        ("gpu", {}, "cudnn"),
        ("gpu", {"documents": True}, "xla_chunked"),
        ("tpu", {}, "xla_chunked"),
    ],
)
def test_auto_takes_the_fastest_that_can(platform, options, expected):
    assert attention.backend_name(select("auto", platform, **options)) == expected


@pytest.mark.parametrize(
    ("name", "platform", "options", "message"),
    [
        ("cudnn", "cpu", {}, "does not run on cpu, only on gpu; use auto or xla_chunked"),
        ("cudnn", "cuda", {"documents": True}, "has no document masks; use auto, or data.document_masking=false"),
        ("cudnn", "cuda", {"dtype": "float32"}, "set execution.compute_dtype=bfloat16, or use auto"),
        ("cudnn", "cuda", {"compute_capability": "7.5"}, "needs compute capability 8.0, not 7.5; use auto"),
        ("cudnn", "cuda", {"head_dim": 60}, "a head_dim of a multiple of 8 from 8 to 128, not 60; use auto"),
        (
            "pallas_triton",
            "cuda",
            {"sequence_length": 1000},
            "multiple of 128 tokens, not 1000: change data.sequence_l",
        ),
        ("pallas_triton", "tpu", {}, "does not run on tpu, only on gpu"),
        ("tokamax_mosaic", "cuda", {"compute_capability": "8.0"}, "needs compute capability 9.0, not 8.0"),
        ("splash", "cuda", {}, "does not run on gpu, only on tpu"),
        ("splash", "tpu", {"sequence_length": 200}, "multiple of 128 tokens, not 200"),
    ],
)
def test_a_backend_that_cannot_is_refused_with_the_mend(name, platform, options, message):
    with pytest.raises(UserError, match=f"^execution.attention={name} .*{message}"):
        select(name, platform, **options)


def test_what_was_asked_for_is_taken_where_it_can():
    for name, platform in (("xla", "cuda"), ("xla_chunked", "tpu"), ("cudnn", "gpu"), ("splash", "tpu")):
        assert select(name, platform) is attention.BACKENDS[name]
    assert select("pallas_triton", "cuda", documents=True, **GPU) is attention.BACKENDS["pallas_triton"]
    assert select("pallas_triton", "cuda") is attention.BACKENDS["pallas_triton"]


@pytest.mark.parametrize("name", ["tokamax_triton", "tokamax_mosaic"])
def test_without_tokamax_its_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(UserError, match=f"execution.attention={name} needs 'tokamax': pip install 'tlite_jax.tokamax"):
        select(name, "cuda")
