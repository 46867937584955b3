"""One table: our parameter <-> Hugging Face name <-> GGUF name, with the shape and the row order of each.

Dims: V vocabulary, D embedding, F MLP, Q = query heads x head_dim, K = key-value heads x head_dim.
"""

from typing import NamedTuple

import numpy as np

from tlite_jax.config import ModelConfig


class Slot(NamedTuple):
    """One tensor of a model: what each project calls it and where it lies in our parameters."""

    path: str  # in the nested dict, e.g. "blocks/query"
    layer: int | None  # index on the leading axis of a stacked parameter
    hugging_face: str
    gguf: str
    shape: tuple[int, ...]  # in Hugging Face's layout [out, in], without the layer axis
    rotary_heads: int | None  # heads whose rows GGUF orders differently; None: same order


class _Row(NamedTuple):
    path: str
    hugging_face: str
    gguf: str
    dims: str
    rotary: str = ""


_TOP = (
    _Row("embedding", "model.embed_tokens.weight", "token_embd.weight", "VD"),
    _Row("final_norm", "model.norm.weight", "output_norm.weight", "D"),
)
_HEAD = _Row("head", "lm_head.weight", "output.weight", "VD")
_BLOCK = (
    _Row("attention_norm", "input_layernorm.weight", "attn_norm.weight", "D"),
    _Row("query", "self_attn.q_proj.weight", "attn_q.weight", "QD", "Q"),
    _Row("key", "self_attn.k_proj.weight", "attn_k.weight", "KD", "K"),
    _Row("value", "self_attn.v_proj.weight", "attn_v.weight", "KD"),
    _Row("output", "self_attn.o_proj.weight", "attn_output.weight", "DQ"),
    _Row("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight", "D"),
    _Row("gate", "mlp.gate_proj.weight", "ffn_gate.weight", "FD"),
    _Row("up", "mlp.up_proj.weight", "ffn_up.weight", "FD"),
    _Row("down", "mlp.down_proj.weight", "ffn_down.weight", "DF"),
)
_BIASES = (
    _Row("query_bias", "self_attn.q_proj.bias", "attn_q.bias", "Q", "Q"),
    _Row("key_bias", "self_attn.k_proj.bias", "attn_k.bias", "K", "K"),
    _Row("value_bias", "self_attn.v_proj.bias", "attn_v.bias", "K"),
    _Row("output_bias", "self_attn.o_proj.bias", "attn_output.bias", "D"),
)


def slots(model: ModelConfig) -> tuple[Slot, ...]:
    """Every tensor of the model, once, layer by layer."""
    dims = {
        "V": model.vocab_size,
        "D": model.hidden_size,
        "F": model.intermediate_size,
        "Q": model.num_attention_heads * model.head_dim,
        "K": model.num_key_value_heads * model.head_dim,
    }
    heads = {"Q": model.num_attention_heads, "K": model.num_key_value_heads, "": None}

    def slot(row: _Row, layer: int | None, prefix: tuple[str, str, str]) -> Slot:
        ours, hugging_face, gguf = prefix
        shape = tuple(dims[dim] for dim in row.dims)
        return Slot(ours + row.path, layer, hugging_face + row.hugging_face, gguf + row.gguf, shape, heads[row.rotary])

    block = _BLOCK + (_BIASES if model.attention_bias else ())
    result = [slot(_TOP[0], None, ("", "", ""))]
    for layer in range(model.num_hidden_layers):
        prefix = ("blocks/", f"model.layers.{layer}.", f"blk.{layer}.")
        result += [slot(row, layer, prefix) for row in block]
    result.append(slot(_TOP[1], None, ("", "", "")))
    if not model.tie_word_embeddings:
        result.append(slot(_HEAD, None, ("", "", "")))
    return tuple(result)


def rows_to_gguf(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key weight from Hugging Face's half-split RoPE to GGUF's interleaved one.

    Args:
      weight: [heads * head_dim, ...].
      heads: query heads, or key-value heads for a key.

    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rows_from_gguf(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `rows_to_gguf`."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
