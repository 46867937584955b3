"""Rows of float32 -> the bytes of a GGUF tensor type, as llama.cpp's reference routines make them.

F32, F16 and BF16 are casts; the rest is the work of `libgguf` (extra `gguf`), which compiles the same C code.
"""

import ml_dtypes
import numpy as np

from tlite_jax.bridge.gguf_types import FLOATS
from tlite_jax.errors import UserError, require

_CASTS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# what a type can hold; the scales of quantised blocks are float16
_LARGEST = {"F32": float(np.finfo(np.float32).max), "BF16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
_LARGEST_FLOAT16 = 65504.0


def require_encoder(kinds: set[str]) -> None:
    """Raises UserError when one of the tensor types needs `libgguf` and it is not installed."""
    if quantised := sorted(kinds - set(FLOATS)):
        require("libgguf", extra="gguf", purpose=f"writing {', '.join(quantised)}")


def row_bytes(kind: str, row_length: int) -> int:
    """Bytes of one encoded row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert row_length % block == 0, f"{kind} needs rows of {block}"
    return row_length // block * block_bytes


def encode(rows: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Encodes rows.

    Args:
      rows: [..., row length], float32, float16 or bfloat16.
      kind: a tensor type; its block divides the row length.
      name: the tensor's, for errors.

    Returns:
      [bytes] uint8.

    Raises:
      UserError: NaN or infinite values; values that the type's float16 scales cannot hold.
    """
    values = np.ascontiguousarray(rows, np.float32)
    largest = float(np.max(np.abs(values), initial=0))
    if not np.isfinite(largest):
        raise UserError(f"{name} has NaN or infinite values: the model is damaged; export an earlier step")
    if largest > _LARGEST.get(kind, _LARGEST_FLOAT16):
        raise UserError(f"{name} has values up to {largest:g}, which {kind} cannot hold; use --type BF16 or F32")
    if kind in _CASTS:
        return values.astype(_CASTS[kind]).reshape(-1).view(np.uint8)
    import libgguf
    from gguf import GGMLQuantizationType

    return libgguf.quantize_rows(values, GGMLQuantizationType[kind]).reshape(-1)
