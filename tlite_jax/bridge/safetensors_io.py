"""Safetensors files: read and written a few rows of a tensor at a time; headers are never trusted.

The header is checked here before anything is read or allocated (the library accepts repeated names and takes seconds
over huge headers). Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tlite_jax.bridge.ahead import in_order, row_slices
from tlite_jax.bridge.checksums import HashedFile
from tlite_jax.bridge.files import contained, listed, parse_json, read_json, refuse_pointer, shown
from tlite_jax.bridge.stored import StoredTensor, forget_rows_of, read_rows_of
from tlite_jax.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 16 << 20  # Llama-3-405B's is 0.15 MB
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_DIMS = 8
MAX_TENSORS = 100_000  # Llama-3-405B has 1,138
MAX_ROW_VALUES = 1 << 26  # a tensor is read by rows: memory holds a few
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Span(NamedTuple):
    """Where a tensor lies in a file's data, as its header says."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Problem(NamedTuple):
    """Why a file's layout is refused: a place in its data."""

    text: str
    begin: int
    size: int
    tensor: str = ""  # that the file ends before the end of


class OutgoingTensor(NamedTuple):
    """A tensor to be written; `read` makes rows of it when their turn comes, in any thread."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of one file; their bytes stay on the disk until read.

    Raises:
      UserError: truncated, or a header that is too long, not JSON, repeats a name, knows no such dtype, or whose
        tensors leave the file, overlap or leave holes.
    """
    spans, data_begin, size = read_spans(path)
    for problem in layout_problems(spans, size - data_begin):
        raise UserError(f"{path}: {problem.text}")
    places = {name: (path, data_begin + span.begin, span.shape, span.dtype) for name, span in spans.items()}
    return {
        name: StoredTensor(
            spans[name].shape, spans[name].dtype.name, partial(read_rows_of, *place), partial(forget_rows_of, *place)
        )
        for name, place in places.items()
    }


def read_spans(path: Path) -> tuple[dict[str, Span], int, int]:
    """Reads the header alone.

    Returns:
      Each tensor's place, where the data begins, and the file's size; whether the places make sense, `layout_problems`
      says.

    Raises:
      UserError: as `read_file`, but for places.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            refuse_pointer(prefix, str(path))
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > size - 8:
                raise UserError(
                    f"{path}: truncated or not safetensors (header of {header_bytes} bytes, file of {size})"
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise UserError(f"{path}: header of {header_bytes} bytes; more than {MAX_HEADER_BYTES} is refused")
            header = parse_json(file.read(header_bytes), f"{path} (header)")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise UserError(f"{path}: its header lists {len(header)} tensors; more than {MAX_TENSORS} are refused")
    return {name: _span(path, name, entry) for name, entry in header.items()}, 8 + header_bytes, size


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a directory: model.safetensors, or the shards its index names.

    Raises:
      UserError: as `read_file`; an index that names files elsewhere, or disagrees with what its shards hold.
    """
    if (directory / SINGLE_NAME).is_file():
        return read_file(contained(directory, SINGLE_NAME, str(directory)))
    return read_index(contained(directory, INDEX_NAME, str(directory)), read_file)


def read_index(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Lists the tensors of the shards that an index names, each read by `read`.

    Raises:
      UserError: the index names files elsewhere or missing, or disagrees with what its shards hold.
    """
    weight_map = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: 'weight_map' must map tensor names to file names")
    claims: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        claims.setdefault(shard, set()).add(name)
    shards = {shard: contained(index.parent, shard, str(index)) for shard in sorted(claims)}
    tensors: dict[str, StoredTensor] = {}
    for shard, path in shards.items():
        stored = read(path)
        if wrong := sorted(claims[shard] ^ stored.keys()):
            raise UserError(f"{index}: disagrees with {shard} about {listed(wrong)}; fetch both again")
        tensors |= stored
    return tensors


def plan_shards(tensors: Iterable[OutgoingTensor], max_shard_bytes: int) -> list[list[OutgoingTensor]]:
    """Groups tensors, in order, into shards of at most `max_shard_bytes` (a larger tensor has a shard to itself)."""
    shards: list[list[OutgoingTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def write_directory(
    directory: Path, tensors: Sequence[OutgoingTensor], max_shard_bytes: int, report: Callable[[int, int], None]
) -> dict[str, str]:
    """Writes model.safetensors, or shards and their index, holding a few slices of tensors in memory.

    Args:
      directory: exists; its caller makes it appear whole (`files.new_directory`).
      tensors: what to write, in order.
      max_shard_bytes: of tensor data in one file.
      report: called with (bytes written, bytes in all).

    Returns:
      SHA-256 of every file of weights, by name.
    """
    sums: dict[str, str] = {}
    shards = plan_shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sums[name] = _write_file(directory / name, shard, partial(_report_all, report, done, total))
        done += sum(tensor.nbytes for tensor in shard)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        metadata = {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sums


def parse_size(text: str) -> int:
    """Reads a size such as "5GB", "500MB" or "2GiB" as bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", text.strip(), flags=re.IGNORECASE)
    value = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if value < 1:
        raise UserError(f"{text!r} is not a size; write it as 5GB, 500MB or 2GiB")
    return int(value)


def _span(path: Path, name: str, entry: Any) -> Span:
    """The (begin, end, shape, dtype) of a header's entry."""

    def whole(values: Any, length: int | None = None) -> bool:
        return (
            isinstance(values, list)
            and (length is None or len(values) == length)
            and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
        )

    if (
        not isinstance(entry, dict)
        or not whole(entry.get("shape"))
        or len(entry["shape"]) > MAX_DIMS
        or not whole(entry.get("data_offsets"), 2)
    ):
        raise UserError(f"{path}: {shown(name)!r} lacks a proper shape or data_offsets")
    code = entry.get("dtype")
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{path}: {shown(name)!r} has dtype {shown(repr(code))}; known: {', '.join(DTYPES)}")
    shape, dtype = tuple(entry["shape"]), DTYPES[code]
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: {shown(name)!r} has {end - begin} bytes, its shape {list(shape)} in {code} needs others"
        )
    if row_values(shape) > MAX_ROW_VALUES:
        raise UserError(f"{path}: {shown(name)!r} has rows of {row_values(shape)} values; {MAX_ROW_VALUES} at most")
    return Span(begin, end, shape, dtype)


def row_values(shape: tuple[int, ...]) -> int:
    """Values of what is read at once: a row, or a whole vector; 0 where there is none."""
    if not math.prod(shape):
        return 0
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def layout_problems(spans: Mapping[str, Span], data_bytes: int) -> Iterator[Problem]:
    """Where the tensors do not cover the file's data exactly: overlaps, holes, what lies outside.

    Args:
      spans: from `read_spans`.
      data_bytes: the file's size without its header.
    """
    position = 0
    for name, (begin, end, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if end > data_bytes:
            text = f"{shown(name)!r} ends at {end}, the file's data at {data_bytes}: truncated, fetch it again"
            yield Problem(text, data_bytes, end - data_bytes, name)
        if begin != position:
            kind = "a hole" if begin > position else "overlap"
            text = f"{shown(name)!r} begins at {begin}, not at {position}: {kind}"
            yield Problem(text, min(begin, position), abs(begin - position))
        position = max(position, end)
    if position < data_bytes:
        left = data_bytes - position
        yield Problem(f"{left} bytes after the last tensor belong to none", position, left)


def _report_all(report: Callable[[int, int], None], before: int, total: int, written: int) -> None:
    report(before + written, total)


def _write_file(path: Path, tensors: Sequence[OutgoingTensor], report: Callable[[int], None]) -> str:
    """Returns the file's SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Wider dtypes first, as the library does, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        tasks = ((tensor, rows) for tensor in ordered for rows in row_slices(tensor.shape))
        for array in in_order(_made, tasks):
            file.write(array)
            written += array.nbytes
            report(written)
    assert written == position, f"{written} bytes of tensors instead of {position}"
    return file.hexdigest()


def _made(task: tuple[OutgoingTensor, slice]) -> np.ndarray:
    tensor, rows = task
    array = np.ascontiguousarray(tensor.read(rows))
    assert array.shape == (rows.stop - rows.start, *tensor.shape[1:]), f"{tensor.name}: {array.shape}"
    assert array.dtype == tensor.dtype, f"{tensor.name}: {array.dtype} instead of {tensor.dtype}"
    return array
