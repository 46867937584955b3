import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import ROPE_SCALING, hf_model, tiny_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tlite_jax.config import Llama3RopeScaling
from tlite_jax.model.layers import apply_rope, linear, rms_norm, rope_frequencies, rope_tables, swiglu

LLAMA_3_1 = Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def hf_frequencies(**changes):
    config = tiny_model(hidden_size=128, num_attention_heads=1, num_key_value_heads=1, **changes)
    return hf_model(config).model.rotary_emb.inv_freq.numpy()


def test_llama_3_1_slows_29_frequencies_and_blends_6():
    plain = rope_frequencies(128, 500000.0, None)
    scaled = rope_frequencies(128, 500000.0, LLAMA_3_1)
    unchanged, slowed = scaled == plain, scaled == plain / np.float32(8)
    blended = ~unchanged & ~slowed
    assert (unchanged.sum(), blended.sum(), slowed.sum()) == (29, 6, 29)
    assert unchanged[:29].all()
    assert slowed[35:].all()
    assert np.all((scaled < plain)[blended] & (scaled > plain / 8)[blended])


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [(128, 500000.0, LLAMA_3_1), (128, 500000.0, None), (64, 10000.0, None), (16, 1000.0, ROPE_SCALING)],
)
def test_frequencies_equal_transformers(head_dim, theta, scaling):
    expected = hf_frequencies(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    ours = rope_frequencies(head_dim, theta, scaling)
    assert ours.dtype == np.float32
    # Two roundings of float32: the power and the blend.
    np.testing.assert_allclose(ours, expected, rtol=3e-7)


def test_rotation_equals_transformers():
    rng = np.random.default_rng(0)
    x_BTNH = rng.normal(size=(2, 50, 3, 16)).astype(np.float32)
    positions = np.stack([np.arange(50), np.arange(900, 950)]).astype(np.int32)
    frequencies = rope_frequencies(16, 1000.0, ROPE_SCALING)
    ours = apply_rope(jnp.asarray(x_BTNH), rope_tables(jnp.asarray(positions), frequencies))
    angles = torch.from_numpy(positions[..., None] * np.concatenate([frequencies, frequencies]).astype(np.float64))
    q = torch.from_numpy(x_BTNH).double().transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(q, q, angles.cos(), angles.sin())
    # An angle of 950 radians is exact to 6e-5 in float32.
    np.testing.assert_allclose(ours, expected.transpose(1, 2), atol=2e-4, rtol=0)
    np.testing.assert_allclose(ours[0], expected.transpose(1, 2)[0], atol=2e-5, rtol=0)


def test_bfloat16_is_rotated_in_float32():
    x = jnp.full((1, 300, 1, 16), 0.3, jnp.bfloat16)
    tables = rope_tables(jnp.arange(300)[None], rope_frequencies(16, 1000.0, None))
    expected = apply_rope(x.astype(jnp.float32), tables).astype(jnp.bfloat16)
    rotated = apply_rope(x, tables)
    assert rotated.dtype == jnp.bfloat16
    assert jnp.array_equal(rotated, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_equals_transformers(dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 24)).astype(np.float32)
    x[0, 0] = 0
    scale = rng.normal(size=24).astype(np.float32)
    norm = LlamaRMSNorm(24, eps=0.05).to(getattr(torch, dtype))
    norm.weight.data = torch.from_numpy(scale).to(getattr(torch, dtype))
    expected = norm(torch.from_numpy(x).to(getattr(torch, dtype))).detach().float()
    ours = rms_norm(jnp.asarray(x, dtype), jnp.asarray(scale, dtype), 0.05)
    assert ours.dtype == dtype
    tolerance = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=tolerance, atol=tolerance * 1e-3)


def test_linear_and_swiglu_follow_their_formulas():
    rng = np.random.default_rng(2)
    x, gate, up = (rng.normal(size=shape) for shape in [(2, 3, 8), (12, 8), (12, 8)])
    down, bias = rng.normal(size=(8, 12)), rng.normal(size=12)

    def f32(*arrays):
        return [jnp.asarray(array, jnp.float32) for array in arrays]

    np.testing.assert_allclose(linear(*f32(x, gate, bias)), x @ gate.T + bias, atol=1e-5)
    gated = x @ gate.T
    expected = (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(swiglu(*f32(x, gate, up, down)), expected, atol=2e-5)
