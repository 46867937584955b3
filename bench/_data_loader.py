"""How many tokens a second one core reads from packed rows into host batches, checksums included."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tlite_jax.config import MixtureConfig
from tlite_jax.data.bucket_writer import BucketWriter
from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.files import write_json
from tlite_jax.data.loader import BatchSource, RowSource, host_batches
from tlite_jax.data.mixture import Plan, make_plan
from tlite_jax.data.packed_rows import write_packed
from tlite_jax.data.row_format import FORMAT_VERSION

LENGTH, NUM_BUCKETS, BATCH = 8192, 24, 64
# What a host of 8 A100 trains on: an 8B model at 45% of their arithmetic.
HOST_TOKENS_PER_SECOND = 24_000


def measure(*, tokens: int, repeats: int) -> dict[str, Any]:
    """Writes buckets of random tokens, reads all of them once, then measures in turns.

    Args:
      tokens: in all buckets together; half of the buckets are packed best_fit.
      repeats: turns.

    Returns:
      contender -> millions of tokens a second of wall clock and of this process's processor time, medians; the share
      of one core that HOST_TOKENS_PER_SECOND takes.
    """
    previous = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(previous)})
    try:
        with tempfile.TemporaryDirectory() as name:
            store = _write(Path(name), tokens)
            plan = make_plan(MixtureConfig(), store.infos(), seed=0, sequence_length=LENGTH, rows=None)
            return _in_turns(_contenders(store, plan), repeats)
    finally:
        os.sched_setaffinity(0, previous)


def _contenders(store: BucketStore, plan: Plan) -> dict[str, Callable[[], Iterator[Any]]]:
    def source(document_masking: Any) -> BatchSource:
        rows = RowSource(plan, store, document_masking=document_masking)
        return BatchSource(rows, start_row=0, batch_size=BATCH, offsets=np.arange(BATCH))

    masked = source("best_fit"), source(True)
    loose = BatchSource(_Unmasked(plan, store), start_row=0, batch_size=BATCH, offsets=np.arange(BATCH))
    return {
        "tokens and targets": lambda: (loose[i] for i in range(len(loose))),
        "with segments of packed rows": lambda: (masked[0][i] for i in range(len(masked[0]))),
        "with segments of all rows": lambda: (masked[1][i] for i in range(len(masked[1]))),
        "tokens and targets, read ahead by Grain": lambda: host_batches(loose),
    }


class _Unmasked(RowSource):
    """Reads packed rows too without segments, which training refuses."""

    def __init__(self, plan: Plan, store: BucketStore) -> None:
        super().__init__(plan, store, document_masking=True)
        self._document_masking = False


def _in_turns(contenders: dict[str, Callable[[], Iterator[Any]]], repeats: int) -> dict[str, Any]:
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, batches in contenders.items():
            wall, processor, read = time.perf_counter(), time.process_time(), 0
            for batch in batches():
                read += batch["tokens"].size
            if turn:  # the first warms the page cache
                rates[name].append((read / (time.perf_counter() - wall), read / (time.process_time() - processor)))
    result = {}
    for name, found in rates.items():
        wall_rate, processor_rate = (statistics.median(column) for column in zip(*found, strict=True))
        result[name] = {
            "wall_mtok_per_second": wall_rate / 1e6,
            "core_mtok_per_second": processor_rate / 1e6,
            "share_of_a_core": HOST_TOKENS_PER_SECOND / processor_rate,
        }
    return result


def _write(directory: Path, tokens: int) -> BucketStore:
    rng = np.random.default_rng(0)
    digests = {}
    for number in range(NUM_BUCKETS):
        lengths = np.clip(rng.lognormal(6.5, 1.0, max(8, tokens // NUM_BUCKETS // 1100)), 20, 60_000).astype(np.int64)
        ids = rng.integers(0, 128_256, lengths.sum(), dtype=np.uint32)
        packing = ("concatenate", "best_fit")[number % 2]
        with BucketWriter(directory, str(number), sequence_length=LENGTH, pad_id=0, packing=packing) as writer:
            if packing == "best_fit":
                starts = np.cumsum(lengths) - lengths
                documents = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
                write_packed(writer, lengths, documents.__getitem__, text_bytes=0)
            else:
                writer.append(ids, lengths, 0)
            digests[str(number)] = writer.close({"bucket": str(number)}, never_trained=False)
    manifest = {"format_version": FORMAT_VERSION, "sequence_length": LENGTH, "buckets": digests}
    write_json(directory / "manifest.json", manifest)
    return BucketStore.open(directory)
