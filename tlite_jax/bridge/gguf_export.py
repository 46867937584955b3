"""GGUF export: a checkpoint's weights, encoded slice by slice, with all that llama.cpp needs to run them.

Memory holds a few slices of SLICE_VALUES values, whatever the model's size. The file appears whole or not at all.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tlite_jax.bridge.ahead import SLICE_VALUES, in_order, row_slices
from tlite_jax.bridge.assemble import WEIGHT_DTYPES, Report, cast_weights, no_report
from tlite_jax.bridge.checksums import HashedFile
from tlite_jax.bridge.files import new_file
from tlite_jax.bridge.gguf import ROPE_FACTORS, factors_of
from tlite_jax.bridge.gguf_file import DEFAULT_ALIGNMENT
from tlite_jax.bridge.gguf_metadata import ReleaseFacts, model_metadata
from tlite_jax.bridge.gguf_quantize import encode, require_encoder, row_bytes
from tlite_jax.bridge.gguf_types import tensor_type
from tlite_jax.bridge.names import Slot, rows_to_gguf, slots
from tlite_jax.bridge.source import TensorSource
from tlite_jax.config import ModelConfig


class PlannedTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    kind: str
    slot: Slot | None  # None: RoPE's factors

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


class _Task(NamedTuple):
    """A slice to be encoded, and the zeros that follow it."""

    tensor: PlannedTensor
    rows: slice
    padding: int


def export_gguf(
    source: TensorSource,
    model: ModelConfig,
    destination: Path,
    file_type: str,
    tokenizer: Mapping[str, Any],
    facts: ReleaseFacts,
    round_to: str | None = None,
    report: Report = no_report,
    before_publishing: Callable[[], None] = lambda: None,
) -> str:
    """Writes one GGUF file, tensor for tensor what `llama-quantize` makes of our F32 (or `round_to`) file.

    Args:
      source: the weights.
      model: their shape.
      destination: the new file.
      file_type: a key of FILE_TYPES.
      tokenizer: metadata from `tokenizer_to_gguf`.
      facts: what the metadata says of the model's origin.
      round_to: float16 or bfloat16: matrices are rounded to it before they are encoded; None: taken as stored.
      report: called with (bytes written, bytes in all).
      before_publishing: called when all is written; if it raises, nothing appears.

    Returns:
      The file's SHA-256, in hexadecimal.

    Raises:
      UserError: the destination exists or cannot be written; NaN, infinite or too large values; `libgguf` is missing.
    """
    plan = plan_tensors(model, file_type)
    require_encoder({tensor.kind for tensor in plan})
    metadata = {**model_metadata(model, file_type, facts), **tokenizer}
    total = sum(tensor.nbytes + -tensor.nbytes % DEFAULT_ALIGNMENT for tensor in plan)
    with new_file(destination) as path:
        header = _header(path, metadata, plan)
        written = 0
        with HashedFile(path) as file:
            file.write(header)
            for content in in_order(_encoder(source, model, round_to), _tasks(plan, model.head_dim)):
                file.write(content)
                written += content.nbytes
                report(written, total)
        assert written == total, f"{written} bytes of tensors instead of {total}"
        before_publishing()
    return file.hexdigest()


def plan_tensors(model: ModelConfig, file_type: str) -> list[PlannedTensor]:
    """Every tensor of the file with its type, in the order in which llama.cpp's quantiser writes them."""
    found: list[tuple[str, tuple[int, ...], Slot | None]] = [(slot.gguf, slot.shape, slot) for slot in slots(model)]
    if model.rope_scaling is not None:
        found.append((ROPE_FACTORS, (model.head_dim // 2,), None))
    plan = [PlannedTensor(name, shape, tensor_type(name, shape, file_type, model), slot) for name, shape, slot in found]
    return sorted(plan, key=lambda tensor: (_layer(tensor), tensor.name))


def _layer(tensor: PlannedTensor) -> int:
    return -1 if tensor.slot is None or tensor.slot.layer is None else tensor.slot.layer


def _tasks(plan: Sequence[PlannedTensor], head_dim: int) -> Iterator[_Task]:
    """Slices of whole heads: within a head GGUF orders rows differently."""
    for tensor in plan:
        for rows in row_slices(tensor.shape, head_dim, SLICE_VALUES):
            is_last = rows.stop == tensor.shape[0]
            yield _Task(tensor, rows, -tensor.nbytes % DEFAULT_ALIGNMENT if is_last else 0)


def _encoder(source: TensorSource, model: ModelConfig, round_to: str | None) -> Callable[[_Task], np.ndarray]:
    """Returns the function that makes the bytes of a slice; threads share it."""
    rounded = WEIGHT_DTYPES[round_to] if round_to else None

    def encoded(task: _Task) -> np.ndarray:
        tensor = task.tensor
        if tensor.slot is None:
            assert model.rope_scaling is not None
            array = factors_of(model.rope_scaling, model.head_dim, model.rope_theta)
        else:
            array = source.read(tensor.slot.hugging_face, task.rows)
            if tensor.slot.rotary_heads is not None:
                array = rows_to_gguf(array, array.shape[0] // model.head_dim)
            if rounded is not None and array.ndim > 1:
                array = cast_weights(tensor.name, array, rounded)
        content = encode(array, tensor.kind, tensor.name)
        return np.pad(content, (0, task.padding)) if task.padding else content

    return encoded


def _header(path: Path, metadata: Mapping[str, Any], plan: Sequence[PlannedTensor]) -> bytes:
    """All that comes before the tensors' data; `path` is written on the way, as the library writes files only."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for tensor in plan:
        kind = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.read_bytes()
    return header + bytes(-len(header) % DEFAULT_ALIGNMENT)


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds metadata in the type that llama.cpp reads it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
