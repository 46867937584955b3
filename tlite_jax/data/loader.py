"""Rows of a plan -> global arrays. Each process reads only the rows that its devices hold.

B batch, T tokens of a row. The position is one integer, rows consumed; Grain reads ahead and keeps no state of ours.
"""

from collections.abc import Iterator
from typing import Any, Literal

import grain
import jax
import numpy as np
import numpy.typing as npt

from tlite_jax.data.buckets import Bucket, BucketStore
from tlite_jax.data.row_format import TOKEN, TOKEN_BITS
from tlite_jax.data.segments import Order
from tlite_jax.errors import UserError

# A batch is one element to Grain: two threads keep one ahead of the step without contending for the interpreter.
_READ_THREADS, _BATCHES_AHEAD = 2, 4

HostBatch = dict[str, npt.NDArray[np.int32]]
DocumentMasking = bool | Literal["best_fit"]


class RowSource:
    """Global row numbers -> rows ready to train on.

    Args:
      plan: which row is where.
      store: the buckets it was made for.
      document_masking: whether rows come with segment_ids: no, those of documents, or "best_fit": those of documents
        in rows of packed documents, and one segment for all of any other row.
    """

    def __init__(self, plan: Order, store: BucketStore, *, document_masking: DocumentMasking) -> None:
        self._plan, self._document_masking = plan, document_masking
        unknown = [bucket.name for bucket in plan.buckets if bucket.name not in store.buckets]
        if unknown:
            raise UserError(f"the mixture's bucket {unknown[0]} is not in {store.directory}")
        self._buckets = [store.buckets[bucket.name] for bucket in plan.buckets]
        for planned, bucket in zip(plan.buckets, self._buckets, strict=True):
            if planned.rows != bucket.manifest["rows"]:
                raise UserError(f"bucket {bucket.name} has changed since the mixture was planned; plan it again")
        store.check_masks([bucket.name for bucket in plan.buckets], document_masking)

    def __len__(self) -> int:
        """Rows of the plan."""
        return self._plan.total_rows

    def read(self, rows: npt.NDArray[np.int64]) -> HostBatch:
        """Returns int32 [rows, T]: tokens, targets (-1: not scored) and, with document masking, segment_ids."""
        shape = len(rows), self._plan.sequence_length
        tokens, targets = np.empty(shape, TOKEN), np.empty(shape, np.int32)
        targets[:, -1] = -1
        segments = np.empty(shape, np.int32) if self._document_masking else None
        buckets, _, places = self._plan.locate(rows)
        for i, (number, place) in enumerate(zip(buckets.tolist(), places.tolist(), strict=True)):
            bucket = self._buckets[number]
            # One row after another, while the processor's cache holds it.
            row = tokens[i]
            bucket.read_into(place, row)
            # A token's highest bit, which says that it is no target, makes it negative as int32.
            np.maximum(row.view(np.int32)[1:], -1, out=targets[i, :-1])
            np.bitwise_and(row, TOKEN_BITS, out=row)
            if segments is not None:
                segments[i] = self._segment_ids(bucket, place)
        result = {"tokens": tokens.view(np.int32), "targets": targets}
        return result if segments is None else {**result, "segment_ids": segments}

    def _segment_ids(self, bucket: Bucket, row: int) -> npt.NDArray[np.int32]:
        if self._document_masking != "best_fit" or bucket.packing == "best_fit":
            return bucket.segment_ids(row)
        return (np.arange(self._plan.sequence_length) < bucket.num_tokens(row)).astype(np.int32)


class BatchSource:
    """Batch number -> the rows of it that this process's devices hold, stacked in row order."""

    def __init__(self, rows: RowSource, *, start_row: int, batch_size: int, offsets: npt.NDArray[np.int64]) -> None:
        self._rows, self._start_row, self._batch_size, self._offsets = rows, start_row, batch_size, offsets

    def __len__(self) -> int:
        """Whole batches from start_row to the plan's end."""
        return max(0, len(self._rows) - self._start_row) // self._batch_size

    def __getitem__(self, number: int) -> HostBatch:
        """A dict of int32 [local rows, T]."""
        return self._rows.read(self._start_row + number * self._batch_size + self._offsets)


def batches(
    plan: Order,
    store: BucketStore,
    *,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    start_row: int,
    document_masking: DocumentMasking,
) -> Iterator[dict[str, jax.Array]]:
    """Reads the plan's rows in order, from any position, on any number of hosts.

    Args:
      plan: the order.
      store: the buckets it was made for.
      sharding: of a [B, T] array; the batch dim may be sharded, e.g. P(("replica", "fsdp")).
      batch_size: B, rows over all devices.
      start_row: rows consumed so far.
      document_masking: also give segment_ids, see RowSource.

    Returns:
      An endless iterator of dicts of global int32 [B, T]: tokens, targets (-1: not scored), segment_ids.

    Raises:
      UserError: B does not divide over the devices; from the iterator, when a batch is not whole within the plan, or
        when a row read is damaged.
    """
    shape = (batch_size, plan.sequence_length)
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise UserError(
            f"batch size {batch_size} does not divide over the {sharding.num_devices} devices of the mesh"
        ) from error
    offsets = local_rows(sharding, shape)
    rows = RowSource(plan, store, document_masking=document_masking)
    source = BatchSource(rows, start_row=start_row, batch_size=batch_size, offsets=offsets)
    return _iterate(source, sharding, shape, offsets, start_row)


def host_batches(source: BatchSource) -> Iterator[HostBatch]:
    """All batches of a source, some of them read ahead."""
    if len(source):
        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
        yield from grain.MapDataset.source(source).to_iter_dataset(options)


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The rows of a [B, T] array that this process's devices hold, each once, ascending: int64 [local rows]."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    spans = {index[0].indices(shape[0])[:2] for index in indices if index is not None}
    return np.unique(np.concatenate([np.arange(*span, dtype=np.int64) for span in spans]))


def _iterate(
    source: BatchSource,
    sharding: jax.sharding.NamedSharding,
    shape: tuple[int, int],
    offsets: npt.NDArray[np.int64],
    start_row: int,
) -> Iterator[dict[str, jax.Array]]:
    for local in host_batches(source):
        yield {name: _to_global(values, sharding, shape, offsets) for name, values in local.items()}
    raise UserError(
        f"the mixture has {len(source._rows)} rows: no whole batch of {shape[0]} is left after row "
        f"{start_row + len(source) * shape[0]}; enlarge its budget or lower train.steps"
    )


def _to_global(
    local: npt.NDArray[np.int32],
    sharding: jax.sharding.NamedSharding,
    shape: tuple[int, int],
    offsets: npt.NDArray[np.int64],
) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> npt.NDArray[np.int32]:
        assert index is not None
        start, stop, _ = index[0].indices(shape[0])
        first = int(np.searchsorted(offsets, start))
        return local[first : first + stop - start, index[1]]

    callback: Any = part
    return jax.make_array_from_callback(shape, sharding, callback)
