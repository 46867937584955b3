"""Tensors of a file -> our nested dict of stacked parameters, and back to named tensors; none is read on the way."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from tlite_jax.bridge.ahead import row_slices
from tlite_jax.bridge.files import listed
from tlite_jax.bridge.names import Slot, slots
from tlite_jax.bridge.safetensors_io import OutgoingTensor
from tlite_jax.bridge.source import TensorSource
from tlite_jax.bridge.stored import StoredParam, StoredTensor
from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError

WeightsDtype = Literal["bfloat16", "float16", "float32"]
WEIGHT_DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_ROTARY_BUFFER = re.compile(r"(model\.)?(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq")

Params = dict[str, Any]
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Imported:
    """A model in another project's files; its weights are read from them when they are asked for.

    Attributes:
      model: its shape.
      params: nested dict of StoredParams, Hugging Face layout, layers stacked; in the dtype they were stored in.
      weights_dtype: the dtype that most of the weights are stored in, and an export's default.
      tensor_dtypes: Hugging Face names of tensors stored in another dtype, so that an export restores theirs.
      tokenizer: Hugging Face tokenizer files (and generation_config.json) by name; empty when there were none.
      notes: what was left out or changed, one sentence each.
    """

    model: ModelConfig
    params: Params
    weights_dtype: WeightsDtype
    tensor_dtypes: dict[str, str]
    tokenizer: dict[str, bytes]
    notes: tuple[str, ...]


def no_report(done: int, total: int) -> None:
    """The default of `report` arguments."""


def expected_slots(model: ModelConfig, stored: Mapping[str, StoredTensor], origin: Path) -> tuple[Slot, ...]:
    """`names.slots`, once the file has a tensor for each layer at all: a config may announce any number of layers.

    Raises:
      UserError: it has fewer tensors than the config has layers.
    """
    if model.num_hidden_layers > len(stored):
        raise UserError(
            f"{origin}: {len(stored)} tensors for the {model.num_hidden_layers} layers that its config describes"
        )
    return slots(model)


class Mismatches(NamedTuple):
    """How a file's tensors differ from those that its config describes."""

    missing: list[str]
    extra: list[str]
    misshapen: list[str]  # with both shapes


def mismatches(
    wanted: Mapping[str, Slot], stored: Mapping[str, StoredTensor], harmless: Iterable[str] = ()
) -> Mismatches:
    """Compares names and shapes."""
    return Mismatches(
        [name for name in wanted if name not in stored],
        sorted(stored.keys() - wanted.keys() - set(harmless)),
        [
            f"{name} is {list(stored[name].shape)} instead of {list(slot.shape)}"
            for name, slot in wanted.items()
            if name in stored and stored[name].shape != slot.shape
        ],
    )


def match_names(
    wanted: Mapping[str, Slot], stored: Mapping[str, StoredTensor], origin: Path, harmless: Iterable[str] = ()
) -> None:
    """Raises one UserError that names every missing, extra and misshapen tensor (the first twenty of each)."""
    found = mismatches(wanted, stored, harmless)
    problems = [
        f"{label}: {listed(names)}"
        for label, names in zip(("missing", "extra", "wrong shape"), found, strict=True)
        if names
    ]
    if problems:
        raise UserError(f"{origin}: the tensors are not those its config describes; {'; '.join(problems)}")


def harmless_extras(stored: Mapping[str, StoredTensor], model: ModelConfig, origin: Path) -> dict[str, str]:
    """Hugging Face tensors that carry nothing, each with the reason: RoPE's buffers and a copy of a tied head.

    Raises:
      UserError: the config ties the head to the embedding, the file holds another head.
    """
    reasons = {name: "recomputed from rope_theta" for name in stored if _ROTARY_BUFFER.fullmatch(name)}
    if model.tie_word_embeddings and "lm_head.weight" in stored and "model.embed_tokens.weight" in stored:
        head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
        if not _same_bits(head, embedding):
            raise UserError(
                f"{origin}: tie_word_embeddings is true, yet lm_head.weight differs from model.embed_tokens.weight; "
                "set tie_word_embeddings to false in config.json if the head is its own"
            )
        reasons["lm_head.weight"] = "a copy of the tied embedding"
    return reasons


def stack(wanted: Mapping[str, Slot], stored: Mapping[str, StoredTensor]) -> Params:
    """Puts every tensor in its place, unread.

    Args:
      wanted: slots by the file's own tensor names, layer by layer.
      stored: the file's tensors, rows in Hugging Face's order; all of `wanted` are there.

    Returns:
      Nested dict of StoredParams. A parameter whose layers differ in dtype is float32.
    """
    tensors: dict[str, list[StoredTensor]] = {}
    stacked = set()
    for name, slot in wanted.items():
        tensors.setdefault(slot.path, []).append(stored[name])
        if slot.layer is not None:
            stacked.add(slot.path)
    params: Params = {}
    for path, layers in tensors.items():
        dtypes = {memory_dtype(tensor.dtype) for tensor in layers}
        dtype = WEIGHT_DTYPES[dtypes.pop() if len(dtypes) == 1 else "float32"]
        group, _, leaf = path.rpartition("/")
        place = params.setdefault(group, {}) if group else params
        place[leaf] = StoredParam(layers, dtype, is_stacked=path in stacked)
    return params


def memory_dtype(dtype: str) -> str:
    """The dtype a stored tensor is kept in: its own, or float32 for what was quantised."""
    return dtype if dtype in WEIGHT_DTYPES else "float32"


def outgoing(
    source: TensorSource, weights_dtype: str, tensor_dtypes: Mapping[str, str] = MappingProxyType({})
) -> list[OutgoingTensor]:
    """Hugging Face tensors of our parameters, rows of which are read and cast when their turn comes.

    Args:
      source: the weights.
      weights_dtype: dtype to write in.
      tensor_dtypes: Hugging Face names of tensors to write in another dtype.
    """

    def read(name: str, dtype: np.dtype, rows: slice) -> np.ndarray:
        return cast_weights(name, source.read(name, rows), dtype)

    result = []
    for name, shape in source.shapes.items():
        dtype = WEIGHT_DTYPES[tensor_dtypes.get(name, weights_dtype)]
        result.append(OutgoingTensor(name, shape, dtype, partial(read, name, dtype)))
    return result


def main_dtype(shares: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """The dtype that most values are in, given (dtype, shape) of every tensor."""
    values: dict[str, int] = {}
    for dtype, shape in shares:
        values[dtype] = values.get(dtype, 0) + math.prod(shape)
    return max(values, key=lambda dtype: values[dtype])


def cast_weights(name: str, source: Any, dtype: np.dtype) -> np.ndarray:
    """Rounds to nearest even; refuses finite values that become infinite."""
    array = np.asarray(source)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any() and not np.isinf(array).any():
        raise UserError(f"{name} has values beyond float16's 65504; export with --dtype bfloat16")
    return cast


def _same_bits(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether dtype, shape and every bit agree; memory holds a few rows."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(one.read(rows).tobytes() == other.read(rows).tobytes() for rows in row_slices(one.shape))
