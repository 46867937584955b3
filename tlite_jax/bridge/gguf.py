"""GGUF files (llama.cpp): import, with whatever quantisation the `gguf` library can undo.

Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from tlite_jax.bridge import gguf_file
from tlite_jax.bridge.assemble import (
    WEIGHT_DTYPES,
    Imported,
    WeightsDtype,
    expected_slots,
    main_dtype,
    match_names,
    stack,
)
from tlite_jax.bridge.files import shown
from tlite_jax.bridge.gguf_metadata import INITIALIZER_KEY, SCALING_KEY, rope_scaling_from
from tlite_jax.bridge.names import Slot, rows_from_gguf
from tlite_jax.bridge.stored import StoredTensor, in_whole_units
from tlite_jax.bridge.tokenizer import check_vocabulary, tokenizer_from_gguf
from tlite_jax.config import Llama3RopeScaling, ModelConfig
from tlite_jax.config_files import parse
from tlite_jax.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 and 3.2: GGUF keeps the scaled frequencies, not these three numbers they came from.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# keys under which a file of architecture "llama" is no plain Llama, with the value that changes nothing
_PLAIN = {
    "expert_count": 0,
    "rope.scaling.type": "none",
    "attention.sliding_window": 0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "use_parallel_residual": False,
}


def import_gguf(source: Path) -> Imported:
    """Opens a Llama model in a GGUF file and reads its tokenizer; weights are read when they are asked for.

    Args:
      source: the file.

    Returns:
      float32, float16 and bfloat16 tensors as they are, quantised ones as float32. `weights_dtype` is the dtype that
      most of the weights have, bfloat16 for quantised ones.

    Raises:
      UserError: another architecture or tokenizer, by name; missing, extra or misshapen tensors; a damaged file.
    """
    metadata, stored = gguf_file.read(source)
    if metadata.get("split.count", 1) != 1:
        raise UserError(f"{source}: one of several parts; join them first with llama-gguf-split --merge")
    model = model_config_from_gguf(metadata, stored, str(source))
    tokenizer = tokenizer_from_gguf(metadata, str(source))
    check_vocabulary(tokenizer, model, str(source))
    wanted = {slot.gguf: slot for slot in expected_slots(model, stored, source)}
    match_names(wanted, stored, source, harmless=(ROPE_FACTORS,))
    for kind in {stored[name].dtype for name in wanted}:
        gguf_file.require_decoder(kind, source)
    ordered = {name: _in_our_order(stored[name], slot, model.head_dim) for name, slot in wanted.items()}
    params = stack(wanted, ordered)
    main = main_dtype((stored[name].dtype, stored[name].shape) for name in wanted)
    if main in WEIGHT_DTYPES:
        return Imported(model, params, cast(WeightsDtype, main), {}, tokenizer, ())
    kinds = ", ".join(sorted({stored[name].dtype for name in wanted}))
    note = f"the weights were quantised ({kinds}); an export is bfloat16 unless told otherwise"
    return Imported(model, params, "bfloat16", {}, tokenizer, (note,))


def model_config_from_gguf(metadata: Mapping[str, Any], stored: Mapping[str, StoredTensor], origin: str) -> ModelConfig:
    """Reads the model's shape from a GGUF file's metadata and tensors.

    Raises:
      UserError: another architecture, naming it and what differs; contradictory metadata.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{origin}: architecture {shown(repr(architecture))} is not supported, only 'llama' is")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{key}", default)

    differing = [f"llama.{key}: {shown(repr(get(key)))}" for key, plain in _PLAIN.items() if get(key, plain) != plain]
    if differing:
        raise UserError(f"{origin}: not a plain Llama model; fields that differ: {', '.join(differing)}")
    if missing := [f"llama.{key}" for key in _KEYS.values() if get(key) is None]:
        raise UserError(f"{origin}: missing metadata: {', '.join(missing)}")
    values = {ours: _short_float(get(key)) for ours, key in _KEYS.items()}
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        raise UserError(
            f"{origin}: llama.attention.head_count is {shown(repr(heads))}; layers that differ are not supported"
        )
    values["num_key_value_heads"] = get("attention.head_count_kv", heads)
    head_dim = values["head_dim"] = get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise UserError(
                f"{origin}: llama.{key} is {shown(repr(get(key)))}, heads have {head_dim} dims; this is not supported"
            )
    embedding = stored.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{origin}: token_embd.weight is missing or not a matrix")
    values["vocab_size"] = embedding.shape[0]
    theta = values["rope_theta"] = _short_float(get("rope.freq_base", 10000.0))
    if type(head_dim) is not int or not isinstance(theta, float) or not 0 < theta < math.inf:
        said = f"llama.rope.freq_base is {shown(repr(theta))}, heads have {shown(repr(head_dim))} dims"
        raise UserError(f"{origin}: {said}; a number above 0 and a whole number are needed")
    values["rope_scaling"] = _rope_scaling(stored.get(ROPE_FACTORS), head_dim, theta, metadata, origin)
    if isinstance(deviation := metadata.get(INITIALIZER_KEY), float):
        values["initializer_range"] = _short_float(deviation)
    values["tie_word_embeddings"] = "output.weight" not in stored
    values["attention_bias"] = any(name.endswith("attn_q.bias") for name in stored)
    return parse(ModelConfig, values, origin)


def rope_factors(factor: float, low: float, high: float, original: int, head_dim: int, theta: float) -> np.ndarray:
    """What llama.cpp stores as rope_freqs.weight for Llama 3.1's scaling: divisors of RoPE's frequencies.

    Returns:
      [head_dim / 2] float32: 1 for short wavelengths, `factor` for long ones, blended between.

    Source: `LlamaModel.generate_extra_tensors` in llama.cpp's convert_hf_to_gguf.py.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)


def factors_of(scaling: Llama3RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """`rope_factors` of a model's scaling."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return rope_factors(scaling.factor, low, high, scaling.original_max_position_embeddings, head_dim, theta)


def _rope_scaling(
    stored: StoredTensor | None, head_dim: int, theta: Any, metadata: Mapping[str, Any], origin: str
) -> dict[str, Any] | None:
    """Recognises Llama 3's RoPE scaling by the factors it leads to; files of ours also hold its four numbers."""
    if stored is None:
        return None
    factors = np.asarray(stored.read(), np.float32).reshape(-1)
    factor, low, high, original = rope_scaling_from(metadata) or (
        round(float(factors.max(initial=0)), 3),
        _LOW,
        _HIGH,
        _ORIGINAL,
    )
    if factors.shape == (head_dim // 2,) and factor > 0 and high > low:
        if np.all(factors == 1) and SCALING_KEY not in metadata:
            return None
        expected = rope_factors(factor, low, high, original, head_dim, theta)
        if np.allclose(factors, expected, rtol=1e-4, atol=0):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            return dict(zip(names, (factor, low, high, original), strict=True))
    raise UserError(
        f"{origin}: rope_freqs.weight is not Llama 3's scaling (low {low:g}, high {high:g}, original {original}); "
        "import the model from its Hugging Face directory"
    )


def _in_our_order(tensor: StoredTensor, slot: Slot, head_dim: int) -> StoredTensor:
    if slot.rotary_heads is None:
        return tensor
    return in_whole_units(tensor, head_dim, lambda rows: rows_from_gguf(rows, rows.shape[0] // head_dim))


def _short_float(value: Any) -> Any:
    """Undoes the float32 rounding of a decimal number: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
