"""Are the weights in a release's files those of the checkpoint: read a few rows at a time, compared bit by bit."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tlite_jax.bridge import gguf_file, safetensors_io
from tlite_jax.bridge.ahead import row_slices
from tlite_jax.bridge.assemble import WEIGHT_DTYPES, cast_weights
from tlite_jax.bridge.gguf import ROPE_FACTORS
from tlite_jax.bridge.gguf_quantize import encode, row_bytes
from tlite_jax.bridge.names import Slot, rows_to_gguf, slots
from tlite_jax.bridge.safetensors_io import StoredTensor
from tlite_jax.bridge.source import ParamsSource
from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError

SAMPLED_VALUES = 1 << 18  # of a quantised tensor: encoding it again is what takes time
_ROUNDINGS = (None, "bfloat16", "float16")  # what `export --dtype` may have done first


@dataclass
class Comparison:
    """Tensors that were compared, and what is wrong, a line each."""

    num_tensors: int = 0
    num_sampled: int = 0  # of them, those of which only the beginning was compared
    kinds: set[str] = field(default_factory=set)
    differences: list[str] = field(default_factory=list)


def not_finite(params: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """The tensors of a checkpoint that hold NaN or infinity, with how many."""
    source, found = ParamsSource(params, model), []
    for name, shape in source.shapes.items():
        count = sum(
            int(np.count_nonzero(~np.isfinite(np.asarray(source.read(name, rows), np.float32))))
            for rows in row_slices(shape)
        )
        if count:
            found.append(f"{name} has {count} values that are NaN or infinite")
    return found


def compare_hf(params: Mapping[str, Any], model: ModelConfig, directory: Path) -> Comparison:
    """Compares a checkpoint, rounded to each tensor's dtype in the directory, with a Hugging Face directory."""
    source, result = ParamsSource(params, model), Comparison()
    stored = safetensors_io.read_directory(directory)
    result.differences += [f"{name} is missing" for name in source.shapes if name not in stored]
    result.differences += [f"{name} is no tensor of the model" for name in stored.keys() - source.shapes.keys()]
    for name, shape in source.shapes.items():
        if name in stored:
            _compare_floats(result, name, shape, stored[name], partial(source.read, name))
    return result


def compare_stored(expected: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor]) -> Comparison:
    """Compares two sets of tensors in files: names, shapes, dtypes and bytes."""
    result = Comparison()
    result.differences += [f"{name} is missing" for name in expected if name not in found]
    result.differences += [f"{name} is new" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name in found and found[name].dtype != tensor.dtype:
            result.differences.append(f"{name} is {found[name].dtype}, it was {tensor.dtype}")
        elif name in found:
            _compare_floats(result, name, tensor.shape, found[name], tensor.read)
    return result


def _compare_floats(result: Comparison, name: str, shape: tuple[int, ...], stored: StoredTensor, read: Any) -> None:
    """Compares every value, `read(rows)` rounded to what is stored."""
    if stored.shape != shape or stored.dtype not in WEIGHT_DTYPES:
        result.differences.append(f"{name} is {stored.dtype} {list(stored.shape)} instead of {list(shape)}")
        return
    dtype, wrong = WEIGHT_DTYPES[stored.dtype], 0
    for rows in row_slices(shape):
        wrong += _num_different(cast_weights(name, read(rows), dtype), stored.read(rows))
    result.num_tensors += 1
    result.kinds.add(stored.dtype)
    if wrong:
        result.differences.append(f"{name}: {wrong} values differ")


def _num_different(first: np.ndarray, second: np.ndarray) -> int:
    kind = f"u{first.dtype.itemsize}"
    return int(np.count_nonzero(np.ascontiguousarray(first).view(kind) != np.ascontiguousarray(second).view(kind)))


def compare_gguf(params: Mapping[str, Any], model: ModelConfig, path: Path) -> Comparison:
    """Compares a GGUF file with what a checkpoint's weights become in each tensor's type.

    Tensors of floats are compared whole; of quantised ones the first SAMPLED_VALUES values, encoded again by the
    exporter's encoder and undone by the `gguf` library.
    """
    source, result = ParamsSource(params, model), Comparison()
    _, stored = gguf_file.read(path)
    wanted = {slot.gguf: slot for slot in slots(model)}
    result.differences += [f"{name} is missing" for name in wanted if name not in stored]
    result.differences += [
        f"{name} is no tensor of the model" for name in stored.keys() - wanted.keys() - {ROPE_FACTORS}
    ]
    roundings = set(_ROUNDINGS)
    for name, slot in wanted.items():
        if name not in stored:
            continue
        if stored[name].shape != slot.shape:
            result.differences.append(f"{name} is {list(stored[name].shape)} instead of {list(slot.shape)}")
            continue
        fitting = {rounding for rounding in roundings if _is_encoded(source, slot, stored[name], model, rounding)}
        result.num_tensors += 1
        result.kinds.add(stored[name].dtype)
        result.num_sampled += stored[name].dtype not in WEIGHT_DTYPES and math.prod(slot.shape) > SAMPLED_VALUES
        if fitting:
            roundings = fitting
        else:
            result.differences.append(f"{name} ({stored[name].dtype}) is not what the checkpoint's weights become")
    return result


def _is_encoded(
    source: ParamsSource, slot: Slot, stored: StoredTensor, model: ModelConfig, rounding: str | None
) -> bool:
    """Whether a tensor of a file is a slot's weights, rounded as said and encoded."""
    for rows in _slices(slot, stored, model):
        array = source.read(slot.hugging_face, rows)
        if slot.rotary_heads is not None:
            array = rows_to_gguf(array, array.shape[0] // model.head_dim)
        try:
            if rounding is not None and array.ndim > 1:
                array = cast_weights(slot.gguf, array, WEIGHT_DTYPES[rounding])
            expected = _undone(array, stored.dtype, slot.gguf)
        except UserError:  # NaN, or values beyond the type: no export wrote them
            return False
        if _num_different(expected, np.asarray(stored.read(rows))):
            return False
    return True


def _slices(slot: Slot, stored: StoredTensor, model: ModelConfig) -> Iterator[slice]:
    """Rows to compare, whole heads at a time: all, or the first of a quantised tensor."""
    if stored.dtype in WEIGHT_DTYPES:
        yield from row_slices(slot.shape, model.head_dim)
    else:
        yield next(row_slices(slot.shape, model.head_dim, SAMPLED_VALUES))


def _undone(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Encodes an array in a tensor type, and decodes it again."""
    if dtype in WEIGHT_DTYPES:
        return cast_weights(name, array, WEIGHT_DTYPES[dtype])
    import gguf

    encoded = encode(array, dtype, name).reshape(*array.shape[:-1], row_bytes(dtype, array.shape[-1]))
    return np.asarray(gguf.dequantize(encoded, gguf.GGMLQuantizationType[dtype]), np.float32)
