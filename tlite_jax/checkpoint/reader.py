"""Arrays of a checkpoint into their shards, as fast as its files can be read.

TensorStore reads any array of any layout. A stored chunk that is, byte for byte, a part of a shard needs less:
TensorStore says where in the files it lies (`tensorstore.ocdbt.dump`), and it is read from there into the shard. Who
verifies a file reads it anyway, and puts its bytes where they belong.
"""

import itertools
import json
import math
import os
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import jax
import numpy as np
import tensorstore

from tlite_jax.errors import UserError

_THREADS = 4
_READ_BYTES = 16 << 20
_AHEAD_BYTES = 4 << 30  # of the host's memory, for shards on their way to devices
_ALIGNMENT = 64

Span = tuple[int, int]
Shard = Any  # a numpy array


class Place(NamedTuple):
    """Where in a file a chunk lies."""

    file: Path
    offset: int
    bytes: int


class Target(NamedTuple):
    """Where the bytes of a file from an offset on belong."""

    offset: int
    memory: memoryview


@dataclass
class _Array:
    """An array that is to be read: its shards, and how each is filled."""

    name: str
    leaf: jax.ShapeDtypeStruct
    shards: list[tuple[list[jax.Device], Shard]] = field(default_factory=list)
    pieces: list[tuple[Place, memoryview]] = field(default_factory=list)
    others: list[tuple[Any, Any]] = field(default_factory=list)  # from TensorStore to TensorStore

    @property
    def bytes(self) -> int:
        return sum(shard.nbytes for _, shard in self.shards)


class Reading:
    """An item of a checkpoint on its way into the shards of this process.

    Args:
      directory: the item.
      abstract: nested dict of ShapeDtypeStructs with shardings. Where the stored shape differs, the difference is
        padding, which is zero; other dtypes are converted.
      process: whose part of the item is read; what it has not written is zero. None: the item is whole.

    Raises:
      UserError: an array is absent or cannot be opened.
    """

    def __init__(self, directory: Path, abstract: Any, process: int | None = None) -> None:
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(abstract)
        self._item = _Item(directory) if process is None else _Part(directory, process)
        self._arrays = deque(self._item.plan(".".join(key.key for key in path), leaf) for path, leaf in leaves)

    @property
    def bytes(self) -> int:
        """What the shards take of the host's memory."""
        return sum(array.bytes for array in self._arrays)

    def targets(self) -> dict[Path, list[Target]]:
        """By file, where its bytes belong."""
        found: dict[Path, list[Target]] = {}
        for place, memory in itertools.chain.from_iterable(array.pieces for array in self._arrays):
            found.setdefault(place.file, []).append(Target(place.offset, memory))
        return found

    def finish(self, filled: Collection[Path] = ()) -> Any:
        """Reads what is missing; to be called once.

        Args:
          filled: the files whose targets have been filled already.

        Returns:
          Nested dict of arrays.

        Raises:
          UserError: an array cannot be read.
        """
        done: list[jax.Array] = []
        under_way: deque[tuple[_Array, list[Any]]] = deque()
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                while self._arrays:
                    array = self._arrays.popleft()
                    under_way.append((array, self._begin(array, filled, pool)))
                    while len(under_way) > 1 and sum(array.bytes for array, _ in under_way) > _AHEAD_BYTES:
                        done.append(self._placed(*under_way.popleft()))
                while under_way:
                    done.append(self._placed(*under_way.popleft()))
            finally:
                pool.shutdown(cancel_futures=True)
        return jax.tree.unflatten(self._structure, done)

    def _begin(self, array: _Array, filled: Collection[Path], pool: ThreadPoolExecutor) -> list[Any]:
        futures: list[Any] = [target.write(source) for source, target in array.others]
        for place, memory in array.pieces:
            if place.file not in filled:
                futures += [pool.submit(_fill, place, memory, begin) for begin in range(0, place.bytes, _READ_BYTES)]
        return futures

    def _placed(self, array: _Array, futures: list[Any]) -> jax.Array:
        try:
            for future in futures:
                future.result()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._item.directory}: {array.name} cannot be read: {reason}") from error
        parts = [jax.device_put(shard, device) for devices, shard in array.shards for device in devices]
        return jax.make_array_from_single_device_arrays(array.leaf.shape, array.leaf.sharding, parts)


def read_sharded(directory: Path, abstract: Any) -> Any:
    """Reads an item of a checkpoint into the shards of this process; see `Reading`."""
    return Reading(directory, abstract).finish()


class _Item:
    """One item of a checkpoint on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._context = tensorstore.Context({"file_io_concurrency": {"limit": _THREADS}})
        try:
            self._places = dict(_places(self.directory, self._context))
        except ValueError as error:
            raise UserError(f"{directory} cannot be opened: {str(error).splitlines()[0]}") from error

    def plan(self, name: str, leaf: jax.ShapeDtypeStruct) -> _Array:
        """How an array is read into shards, which are made; nothing is read."""
        stored, array = open_array(self.directory, name, self._context), _Array(name, leaf)
        for spans, devices in _by_spans(leaf).items():
            shard = _empty(tuple(end - begin for begin, end in spans), leaf.dtype)
            array.shards.append((devices, shard))
            inside = [(begin, min(end, size)) for (begin, end), size in zip(spans, stored.shape, strict=True)]
            if inside != list(spans):
                shard[...] = 0
            if any(begin >= end for begin, end in inside):
                continue
            pieces = self._pieces(name, stored, spans, inside, shard)
            if pieces is not None:
                array.pieces += pieces
                continue
            source = stored[tuple(slice(*span) for span in inside)]
            into = shard[(*(slice(0, end - begin) for begin, end in inside), ...)]
            target = tensorstore.array(into)
            if inside:
                target = target[tensorstore.d[:].translate_to[[begin for begin, _ in inside]]]
            array.others.append((tensorstore.cast(source, shard.dtype), target))
        return array

    def _pieces(
        self, name: str, stored: Any, spans: Sequence[Span], inside: Sequence[Span], shard: Shard
    ) -> list[tuple[Place, memoryview]] | None:
        """The chunks of a shard and where each belongs in it; None when they are not parts of it byte for byte."""
        layout = stored.spec().to_json()["metadata"]
        if layout.get("compressor") or layout.get("filters") or layout.get("order") != "C":
            return None
        if stored.dtype.numpy_dtype != shard.dtype or not shard.ndim:
            return None
        chunks = layout["chunks"]
        separator = layout.get("dimension_separator", ".")
        pieces = []
        for number in itertools.product(
            *(range(begin // chunk, -(-end // chunk)) for (begin, end), chunk in zip(inside, chunks, strict=True))
        ):
            box = [(n * chunk, (n + 1) * chunk) for n, chunk in zip(number, chunks, strict=True)]
            if any(low < begin or high > end for (low, high), (begin, end) in zip(box, inside, strict=True)):
                return None
            piece = shard[
                tuple(slice(low - begin, high - begin) for (low, high), (begin, _) in zip(box, spans, strict=True))
            ]
            place = self._places.get(f"{name}/{separator.join(map(str, number))}")
            if not piece.flags.c_contiguous or place is None or place.bytes != piece.nbytes:
                return None
            pieces.append((place, memoryview(piece.reshape(-1).view(np.uint8))))
        return pieces


class _Part(_Item):
    """What one process has written of an item, which may be nothing of an array, or of all."""

    def __init__(self, item: Path, process: int) -> None:
        self._names = chunks_of_part(item, process).keys()
        if self._names:
            super().__init__(_part(item, process))

    def plan(self, name: str, leaf: jax.ShapeDtypeStruct) -> _Array:
        """See `_Item`."""
        if name in self._names:
            return super().plan(name, leaf)
        array = _Array(name, leaf)
        for spans, devices in _by_spans(leaf).items():
            shard = _empty(tuple(end - begin for begin, end in spans), leaf.dtype)
            shard[...] = 0
            array.shards.append((devices, shard))
        return array


def chunks_of_part(item: Path, process: int) -> dict[str, tuple[int, int]]:
    """By name of an array, how many chunks a process has written, and how many the whole array has."""
    directory = _part(item, process)
    if not directory.is_dir():
        return {}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()
    written = Counter(key.decode().rpartition("/")[0] for key in store.list().result())
    found = {}
    for name, keys in written.items():
        layout = json.loads(store.read(f"{name}/.zarray").result().value)
        grid = [-(-size // chunk) for size, chunk in zip(layout["shape"], layout["chunks"], strict=True)]
        found[name] = (keys - 1, math.prod(grid))
    return found


def array_names(item: Path) -> list[str]:
    """The arrays that an item consists of, as Orbax has noted them."""
    noted = json.loads((item / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"].values()
    return [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in noted]


def _part(item: Path, process: int) -> Path:
    return item.absolute() / f"ocdbt.process_{process}"


def _by_spans(leaf: jax.ShapeDtypeStruct) -> dict[tuple[Span, ...], list[jax.Device]]:
    """The devices of this process by what they hold of an array."""
    found: dict[tuple[Span, ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        spans = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        found.setdefault(spans, []).append(device)
    return found


def _is_ocdbt(directory: Path) -> bool:
    """Whether an item's arrays lie in an OCDBT store, as those that Orbax writes do, or else a file a chunk."""
    return (directory / "manifest.ocdbt").exists()


def open_array(directory: Path, name: str, context: tensorstore.Context) -> Any:
    """Opens an array of an item, and reads nothing of it.

    Raises:
      UserError: it is absent or cannot be opened.
    """
    kvstore: Any = f"file://{directory.absolute()}/"
    if _is_ocdbt(directory):
        kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{name}/"}
    else:
        kvstore += f"{name}/"
    try:
        return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, context=context).result()
    except ValueError as error:
        raise UserError(f"{directory}: {name} cannot be opened: {str(error).splitlines()[0]}") from error


def _places(directory: Path, context: tensorstore.Context) -> Iterator[tuple[str, Place]]:
    """Where the chunks of an item lie, by key; those that lie in the index itself are left out."""
    if not _is_ocdbt(directory):
        for path in directory.glob("*/[0-9]*"):
            yield f"{path.parent.name}/{path.name}", Place(path, 0, path.stat().st_size)
        return
    store = tensorstore.KvStore.open(f"file://{directory}/", context=context).result()
    manifest = tensorstore.ocdbt.dump(store).result()
    nodes = [(manifest["versions"][-1]["root"].get("location"), b"")]
    while nodes:
        location, prefix = nodes.pop()
        if location is None:
            continue
        node = tensorstore.ocdbt.dump(store, location).result()
        for entry in node["entries"]:
            key = prefix + entry["key"]
            if node["height"]:
                nodes.append((entry["location"], key[: len(prefix) + entry["subtree_common_prefix_length"]]))
            elif "indirect_value" in entry:
                _, base, file, offset, size = entry["indirect_value"].split(":")
                path = directory / (unquote(base) + unquote(file))
                yield key.decode(), Place(path, int(offset), int(size))


def _empty(shape: tuple[int, ...], dtype: Any) -> Shard:
    """Memory that a device which is the host takes over as it is."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _fill(place: Place, piece: memoryview, begin: int) -> None:
    """Reads a part of a chunk from its file."""
    end = min(begin + _READ_BYTES, place.bytes)
    file = os.open(place.file, os.O_RDONLY)
    try:
        while begin < end:
            count = os.preadv(file, [piece[begin:end]], place.offset + begin)
            if not count:
                raise OSError(f"{place.file} ends early")
            begin += count
    finally:
        os.close(file)
