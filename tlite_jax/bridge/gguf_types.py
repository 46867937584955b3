"""Which tensor of a Llama gets which GGUF type when a file is, say, Q4_K_M: llama.cpp's rules, without an imatrix.

The rules are those of `llama_tensor_get_type` and `tensor_type_fallback` (src/llama-quant.cpp) in the llama.cpp that
llama-cpp-python 0.3.36 builds. Rules for mixtures of experts cannot apply: our models are dense.
"""

from collections.abc import Callable
from typing import NamedTuple

from tlite_jax.config import ModelConfig

FLOATS = ("F32", "F16", "BF16")
_BLOCKS = {"F32": 1, "F16": 1, "BF16": 1} | dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), 32)
_SUPER_BLOCK = 256
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class FileType(NamedTuple):
    """What `--type` names."""

    code: int  # general.file_type: llama_ftype of llama.h
    default: str  # the type of the matrices that no rule speaks of


FILE_TYPES = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "BF16": FileType(32, "BF16"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q6_K": FileType(18, "Q6_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q4_0": FileType(2, "Q4_0"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "Q2_K": FileType(10, "Q2_K"),
}


class _Place(NamedTuple):
    """Where a matrix stands in a model."""

    layer: int
    num_layers: int
    heads_per_key: int

    @property
    def deserves_more_bits(self) -> bool:
        """The first and the last eighth of the layers, and every third between."""
        eighth = self.num_layers // 8
        return self.layer < eighth or self.layer >= 7 * self.num_layers // 8 or (self.layer - eighth) % 3 == 2


# (file type, part of the block) -> its type, where that may differ from the file's default; None: it does not here
_RULES: dict[tuple[str, str], Callable[[_Place], str | None]] = {
    ("Q2_K", "attn_v"): lambda at: "Q4_K" if at.heads_per_key >= 4 else "Q3_K",
    ("Q3_K_M", "attn_v"): lambda at: "Q5_K" if at.layer < 2 else "Q4_K",
    ("Q3_K_L", "attn_v"): lambda at: "Q5_K",
    ("Q4_K_S", "attn_v"): lambda at: "Q5_K" if at.layer < 4 else None,
    ("Q4_K_M", "attn_v"): lambda at: "Q6_K" if at.deserves_more_bits else None,
    ("Q5_K_M", "attn_v"): lambda at: "Q6_K" if at.deserves_more_bits else None,
    ("Q2_K", "ffn_down"): lambda at: "Q3_K",
    ("Q3_K_M", "ffn_down"): lambda at: "Q5_K" if at.layer < at.num_layers // 16 else "Q4_K",
    ("Q3_K_L", "ffn_down"): lambda at: "Q5_K",
    ("Q4_K_S", "ffn_down"): lambda at: "Q5_K" if at.layer < at.num_layers // 8 else None,
    ("Q4_K_M", "ffn_down"): lambda at: "Q6_K" if at.deserves_more_bits else None,
    ("Q5_K_M", "ffn_down"): lambda at: "Q6_K" if at.deserves_more_bits else None,
    ("Q2_K", "attn_output"): lambda at: "Q3_K",
    ("Q3_K_M", "attn_output"): lambda at: "Q4_K",
    ("Q3_K_L", "attn_output"): lambda at: "Q5_K",
}


def block_size(kind: str) -> int:
    """Values that a tensor type encodes together; a row must be a multiple of it."""
    return _BLOCKS.get(kind, _SUPER_BLOCK)


def tensor_type(name: str, shape: tuple[int, ...], file_type: str, model: ModelConfig) -> str:
    """The type that llama.cpp gives a tensor.

    Args:
      name: GGUF's, e.g. blk.3.ffn_down.weight.
      shape: [rows, row length]; vectors (norms, biases, RoPE factors) stay F32.
      file_type: a key of FILE_TYPES.
      model: decides by its layers, its heads and whether its head is tied.

    Returns:
      The name of a tensor type: F32, F16, BF16, Q8_0, Q4_K and so on.
    """
    if len(shape) < 2:
        return "F32"
    default = FILE_TYPES[file_type].default
    if default in FLOATS:
        return default
    return _that_fits(_wanted(name, shape[-1], file_type, default, model), shape[-1])


def _wanted(name: str, row_length: int, file_type: str, default: str, model: ModelConfig) -> str:
    if name == "output.weight" or (name == "token_embd.weight" and model.tie_word_embeddings):
        return "Q8_0" if row_length % block_size(default) or default == "Q8_0" else "Q6_K"
    if not name.startswith("blk."):
        return default
    _, layer, part, _ = name.split(".")
    rule = _RULES.get((file_type, part))
    at = _Place(int(layer), model.num_hidden_layers, model.num_attention_heads // model.num_key_value_heads)
    kind = (rule and rule(at)) or default
    # Llama-2-70B's and Llama-3-70B's eight heads share one small attn_v.
    is_70b = model.num_hidden_layers == 80 and at.heads_per_key > 1
    return "Q5_K" if part == "attn_v" and is_70b and kind in ("Q3_K", "Q4_K") else kind


def _that_fits(kind: str, row_length: int) -> str:
    """The type itself, or the one llama.cpp falls back to when rows are no multiple of its block."""
    if row_length % block_size(kind):
        kind = _FALLBACKS.get(kind, kind)
    return "F16" if row_length % block_size(kind) else kind
