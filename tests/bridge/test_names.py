"""The table of names, and GGUF's row order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from tests.bridge.tiny import CONFIGS, tiny_model
from tlite_jax.bridge.hf_config import model_config_from_hf
from tlite_jax.bridge.names import rows_from_gguf, rows_to_gguf, slots


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_transformers_is_named_once_with_its_shape(name: str) -> None:
    model: LlamaForCausalLM = tiny_model(name)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    table = slots(model_config_from_hf(model.config.to_dict()))
    assert {slot.hugging_face: slot.shape for slot in table} == state
    assert len({slot.gguf for slot in table}) == len({(slot.path, slot.layer) for slot in table}) == len(table)


def rotate_half_split(x_H: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE as transformers applies it: dim i pairs with dim i + H/2."""
    first, second = np.split(x_H, 2)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def rotate_interleaved(x_H: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE as llama.cpp applies it to Llama: dim 2i pairs with dim 2i + 1."""
    cos, sin = np.cos(angles), np.sin(angles)
    result = np.empty_like(x_H)
    result[0::2] = x_H[0::2] * cos - x_H[1::2] * sin
    result[1::2] = x_H[1::2] * cos + x_H[0::2] * sin
    return result


def test_gguf_rows_give_the_same_attention_under_interleaved_rope() -> None:
    random = np.random.default_rng(0)
    heads, head_dim, width = 3, 8, 16
    query, key = random.normal(size=(2, heads * head_dim, width))
    x, y = random.normal(size=(2, width))
    angles = random.normal(size=head_dim // 2)
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        ours = rotate_half_split(query[rows] @ x, 3 * angles) @ rotate_half_split(key[rows] @ y, angles)
        q, k = rows_to_gguf(query, heads)[rows], rows_to_gguf(key, heads)[rows]
        theirs = rotate_interleaved(q @ x, 3 * angles) @ rotate_interleaved(k @ y, angles)
        np.testing.assert_allclose(theirs, ours, rtol=1e-12)


@given(heads=st.integers(1, 6), half=st.integers(1, 6), columns=st.none() | st.integers(1, 5))
def test_row_orders_are_inverses(heads: int, half: int, columns: int | None) -> None:
    shape = (heads * half * 2,) if columns is None else (heads * half * 2, columns)
    weight = np.arange(np.prod(shape)).reshape(shape)
    assert np.array_equal(rows_from_gguf(rows_to_gguf(weight, heads), heads), weight)
    assert np.array_equal(rows_to_gguf(rows_from_gguf(weight, heads), heads), weight)
