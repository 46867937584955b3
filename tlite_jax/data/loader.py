"""Rows of a plan -> global arrays. Each process reads only the rows that its devices hold.

B batch, T tokens of a row. The position is one integer, rows consumed; Grain reads ahead and keeps no state of ours.
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import numpy.typing as npt

from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.mixture import Plan
from tlite_jax.errors import UserError

# A batch is one element to Grain: two threads keep one ahead of the step without contending for the interpreter.
_READ_THREADS, _BATCHES_AHEAD = 2, 4

HostBatch = dict[str, npt.NDArray[np.int32]]


class RowSource:
    """Global row number -> one row, ready to train on; a Grain `RandomAccessDataSource`."""

    def __init__(self, plan: Plan, store: BucketStore, *, document_masking: bool) -> None:
        self._plan, self._document_masking = plan, document_masking
        unknown = [bucket.name for bucket in plan.buckets if bucket.name not in store.buckets]
        if unknown:
            raise UserError(f"the mixture's bucket {unknown[0]} is not in {store.directory}")
        self._buckets = [store.buckets[bucket.name] for bucket in plan.buckets]
        for planned, bucket in zip(plan.buckets, self._buckets, strict=True):
            if planned.rows != bucket.manifest["rows"]:
                raise UserError(f"bucket {bucket.name} has changed since the mixture was planned; plan it again")

    def __len__(self) -> int:
        """Rows of the plan."""
        return self._plan.total_rows

    def __getitem__(self, row: int) -> HostBatch:
        """One row: tokens, targets and, with document masking, segment_ids, int32 [T]."""
        return self.read(np.array([row]))[0]

    def read(self, rows: npt.NDArray[np.int64]) -> list[HostBatch]:
        """Several rows, located together."""
        buckets, _, places = self._plan.locate(rows)
        return [self._row(int(bucket), int(place)) for bucket, place in zip(buckets, places, strict=True)]

    def _row(self, bucket_index: int, row: int) -> HostBatch:
        bucket = self._buckets[bucket_index]
        tokens = bucket.read_row(row).astype(np.int32)
        targets = np.full_like(tokens, -1)
        scored = bucket.num_tokens(row) - 1
        targets[:scored] = tokens[1 : scored + 1]
        result = {"tokens": tokens, "targets": targets}
        return {**result, "segment_ids": bucket.segment_ids(row)} if self._document_masking else result


class BatchSource:
    """Batch number -> the rows of it that this process's devices hold, stacked in row order."""

    def __init__(self, rows: RowSource, *, start_row: int, batch_size: int, offsets: npt.NDArray[np.int64]) -> None:
        self._rows, self._start_row, self._batch_size, self._offsets = rows, start_row, batch_size, offsets

    def __len__(self) -> int:
        """Whole batches from start_row to the plan's end."""
        return max(0, len(self._rows) - self._start_row) // self._batch_size

    def __getitem__(self, number: int) -> HostBatch:
        """A dict of int32 [local rows, T]."""
        rows = self._rows.read(self._start_row + number * self._batch_size + self._offsets)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(
    plan: Plan,
    store: BucketStore,
    *,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    start_row: int,
    document_masking: bool,
) -> Iterator[dict[str, jax.Array]]:
    """Reads the plan's rows in order, from any position, on any number of hosts.

    Args:
      plan: the order.
      store: the buckets it was made for.
      sharding: of a [B, T] array; the batch dim may be sharded, e.g. P(("replica", "fsdp")).
      batch_size: B, rows over all devices.
      start_row: rows consumed so far.
      document_masking: also give segment_ids.

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
    if len(source):
        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
        for local in grain.MapDataset.source(source).to_iter_dataset(options):
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
