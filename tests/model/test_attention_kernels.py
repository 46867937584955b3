"""The kernels emulated on CPU against float64, and lowered and compiled for the machines that they are for."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import inputs, reference, with_gradients
from jax._src.cudnn import fused_attention_stablehlo

from tlite_jax.errors import UserError
from tlite_jax.model import attention, attention_kernels
from tlite_jax.plan import topology

HARDWARE = Path(__file__).resolve().parents[2] / "configs" / "hardware"
EMULATED = {
    "pallas_triton": partial(attention.BACKENDS["pallas_triton"], interpret=True),
    "splash": partial(attention.BACKENDS["splash"], interpret=True),
}
NVIDIA_PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
needs_nvidia_plugin = pytest.mark.skipif(
    not NVIDIA_PLUGIN, reason="compiling for a GPU needs jax-cuda12-plugin and jax-cuda12-pjrt (no GPU, no CUDA)"
)


@pytest.fixture
def without_cudnn(monkeypatch):
    """Lets cuDNN's call be traced where cuDNN is not installed: the program does not depend on it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize(("documents", "length", "head_dim"), [(False, 384, 32), (True, 384, 32), (True, 256, 48)])
def test_output_and_gradients_equal_float64(backend, documents, length, head_dim):
    arrays = inputs(length=length, heads=4, kv_heads=1, documents=documents, head_dim=head_dim, rows=2)
    expected = reference(*arrays)
    q, k, v, segments, upstream = (None if x is None else jnp.asarray(x, jnp.float32) for x in arrays)
    segments = None if segments is None else segments.astype(jnp.int32)
    actual = with_gradients(EMULATED[backend], q, k, v, segments, upstream)
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=6e-6, rtol=0, err_msg=name)


def test_splash_sums_the_queries_gradients_over_long_blocks_of_keys(monkeypatch):
    monkeypatch.setattr(attention_kernels, "SPLASH_LARGEST_BLOCK", 128)
    assert attention_kernels.splash_blocks(2048) == (128, 256)
    arrays = inputs(length=2048, heads=2, kv_heads=1, documents=True, head_dim=32, rows=1)
    q, k, v, segments, upstream = (jnp.asarray(x, jnp.float32) for x in arrays)
    actual = with_gradients(EMULATED["splash"], q, k, v, segments.astype(jnp.int32), upstream)
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), actual, reference(*arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=6e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("documents", [False, True])
def test_tokamax_triton_equals_float64(documents, monkeypatch):
    pytest.importorskip("tokamax", reason="the extra tokamax is not installed")
    from jax.experimental import pallas
    from tokamax import config
    from tokamax._src.pallas import block

    monkeypatch.setattr(pallas, "pallas_call", partial(pallas.pallas_call, interpret=True))
    # The emulator has no program ids in loops and conditions. Here they are idle: blocks divide the length, so that no
    # bounds are checked, and the two grids of the backward kernel are equal, so that its conditions hold.
    monkeypatch.setattr(block, "_pids", lambda: (0, 0))
    monkeypatch.setattr(pallas, "when", lambda condition: lambda function: function())
    arrays = inputs(length=256, heads=4, kv_heads=1, documents=documents, head_dim=32, rows=2)
    expected = reference(*arrays)
    q, k, v, segments, upstream = (None if x is None else jnp.asarray(x, jnp.float32) for x in arrays)
    with config.cross_compile(True):
        actual = with_gradients(attention.BACKENDS["tokamax_triton"], q, k, v, segments, upstream)
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=6e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("backend", EMULATED)
def test_bfloat16_sums_in_float32(backend):
    """Each result is rounded once, and q, k, v, weights and score gradients are rounded on the way: 2^-8 each."""
    arrays = inputs(length=384, heads=4, kv_heads=1, documents=True, head_dim=32, rows=1)
    q, k, v, _, upstream = (None if x is None else jnp.asarray(x, jnp.bfloat16) for x in arrays)
    segments = arrays[3]
    exact = reference(*(np.asarray(x, np.float64) for x in (q, k, v)), segments, np.asarray(upstream, np.float64))
    actual = with_gradients(EMULATED[backend], q, k, v, jnp.asarray(segments), upstream)
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), actual, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < 2**-7, name


def abstract(length, *, documents, heads=8, kv_heads=2, head_dim=64, sharding=None):
    def array(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, length, *dims), dtype, sharding=sharding)

    q, kv = array(heads, head_dim), array(kv_heads, head_dim)
    return q, kv, kv, array(dtype=jnp.int32) if documents else None, q


def forward_and_backward(backend):
    return jax.jit(partial(with_gradients.__wrapped__, attention.BACKENDS[backend]))


@pytest.mark.parametrize(
    ("backend", "documents", "platform", "kernels"),
    [
        ("cudnn", False, "cuda", {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}),
        ("pallas_triton", False, "cuda", {"__gpu$xla.gpu.triton": 3}),
        ("pallas_triton", True, "cuda", {"__gpu$xla.gpu.triton": 3}),
        ("splash", False, "tpu", {"tpu_custom_call": 2}),
        ("splash", True, "tpu", {"tpu_custom_call": 2}),
    ],
)
def test_lowers_to_its_kernels_without_a_square_array(backend, documents, platform, kernels, without_cudnn):
    traced = forward_and_backward(backend).trace(*abstract(384, documents=documents))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for kernel, count in kernels.items():
        assert text.count(f"@{kernel}(") == count
    types = [line.rpartition(" : ")[2] for line in text.splitlines()]  # without the kernels' own code
    assert any("384x64" in line or "384x8x64" in line for line in types)
    assert not any("384x384" in line for line in types)


@needs_nvidia_plugin
@pytest.mark.parametrize("hardware", ["a100-80gb", "h100"])
@pytest.mark.parametrize(("backend", "documents", "mebibytes"), [("cudnn", False, 2), ("pallas_triton", True, 260)])
def test_compiles_for_nvidia_in_linear_memory_without_spilling(backend, documents, mebibytes, hardware, without_cudnn):
    device = topology.devices(topology.load_hardware(hardware, HARDWARE), 1)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def temporaries(length):
        shapes = abstract(length, documents=documents, heads=32, kv_heads=8, head_dim=128, sharding=sharding)
        options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
        compiled = forward_and_backward(backend).lower(*shapes).compile(compiler_options=options)
        return compiled.memory_analysis().temp_size_in_bytes

    at_8k = temporaries(8192)
    assert at_8k < mebibytes * 2**20
    assert at_8k < 2.1 * temporaries(4096)


@pytest.mark.parametrize("backend", EMULATED)
def test_a_length_that_no_block_divides_is_refused_with_the_mend(backend):
    q, k, v, _, _ = inputs(length=200, heads=2, kv_heads=1, documents=False)
    with pytest.raises(UserError, match=f"{backend} needs sequences of a multiple of 128 tokens, not 200: change"):
        EMULATED[backend](q, k, v, None)


def test_cudnn_refuses_document_masks_and_names_the_mend():
    q, k, v, segments, _ = inputs(length=8, heads=2, kv_heads=1, documents=True)
    with pytest.raises(UserError, match="use auto, pallas_triton or xla_chunked"):
        attention.BACKENDS["cudnn"](q, k, v, segments)
