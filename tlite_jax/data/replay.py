"""What a batch of a run held: its rows and their documents, found by arithmetic."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tlite_jax.data.buckets import Bucket, BucketStore
from tlite_jax.data.row_format import OFFSET
from tlite_jax.data.segments import Timeline
from tlite_jax.errors import UserError


def contents(timeline: Timeline, store: BucketStore, start_row: int, num_rows: int) -> Iterator[dict[str, Any]]:
    """Says what each of some consecutive rows of a run held.

    Args:
      timeline: of the run.
      store: its buckets.
      start_row: the first one, such as the number of rows read before a step.
      num_rows: how many, such as a batch.

    Yields:
      {"slot": from 0, "bucket", "pass", "row": in the bucket, "documents": [first, last] by their numbers in the
      bucket, "starts": tokens of the row at which documents begin, "tokens": that are not padding}.

    Raises:
      UserError: the timeline has no such rows, or a bucket is gone.
    """
    places = timeline.locate(np.arange(start_row, start_row + num_rows))
    for slot, (number, epoch, row) in enumerate(zip(*(values.tolist() for values in places), strict=True)):
        bucket = store.buckets.get(timeline.buckets[number].name)
        if bucket is None:
            raise UserError(f"{store.directory} has no bucket {timeline.buckets[number].name} any more")
        yield {"slot": slot, "bucket": bucket.name, "pass": epoch, "row": row, **_documents(bucket, row)}


def _documents(bucket: Bucket, row: int) -> dict[str, Any]:
    """Documents of a row by their numbers in the bucket, and where those that begin in it do."""
    starts, num_tokens = bucket.documents(row)
    first_token = row * bucket.manifest["sequence_length"]
    before = _documents_before(bucket, first_token)
    inside = [int(start) - first_token for start in starts if start >= first_token]
    goes_on = not inside or inside[0] > 0
    first = before - 1 if goes_on else before
    return {"documents": [first, before + len(inside) - 1], "starts": inside, "tokens": num_tokens}


def _documents_before(bucket: Bucket, token: int) -> int:
    """How many of a bucket's documents begin before a token."""
    starts = np.memmap(bucket.directory / "documents.bin", OFFSET, mode="r")
    return int(np.searchsorted(starts, token, side="left"))
