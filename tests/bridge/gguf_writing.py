"""GGUF files of tiny models, written with the `gguf` library as llama.cpp's converter does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, TokenType, quants
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, suffix = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{suffix}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{BLOCK_NAMES[part]}.{suffix}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Half-split rows -> interleaved, row by row."""
    head_dim = weight.shape[0] // heads
    order = [
        head * head_dim + pair + part * head_dim // 2
        for head in range(heads)
        for pair in range(head_dim // 2)
        for part in (0, 1)
    ]
    return weight[order]


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: Kind,
    tokenizer: Tokenizer,
    *,
    pre: str = "gpt-2",
    architecture: str = "llama",
    extra: dict[str, Any] | None = None,
    skip: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Writes the model; returns what each Hugging Face tensor is once quantised and undone.

    Args:
      path: the new file.
      model: in float32.
      kind: of matrices; norms and biases are F32.
      tokenizer: byte-level BPE.
      pre: name of the pre-tokenizer.
      architecture: written as such.
      extra: metadata and tensors to add or to replace (arrays become F32 tensors).
      skip: Hugging Face names of tensors and metadata keys to leave out.
    """
    config, writer = model.config, GGUFWriter(path, architecture)
    scalars: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **tokenizer_metadata(tokenizer, pre),
    }
    tensors = {key: value for key, value in (extra or {}).items() if isinstance(value, np.ndarray)}
    scalars |= {key: value for key, value in (extra or {}).items() if key not in tensors}
    for key, value in scalars.items():
        if key not in skip:
            add_value(writer, key, value)
    undone = {}
    for name, tensor in model.state_dict().items():
        if name in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        used = kind if tensor.ndim == 2 else Kind.F32
        array = (tensor if heads is None else permuted(tensor, heads)).numpy()
        data = quants.quantize(array, used)
        writer.add_tensor(gguf_name(name), data, raw_dtype=used)
        undone[name] = quants.dequantize(quants.quantize(tensor.numpy(), used), used)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return undone


def tokenizer_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level BPE tokenizer."""
    content = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    types = [
        TokenType.NORMAL if token not in special else TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
        for token in tokens
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
    }


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata in the type that llama.cpp uses for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, str(value))
    else:
        writer.add_array(key, value)
