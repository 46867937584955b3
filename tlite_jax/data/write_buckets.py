"""All buckets of a corpus: each is written by itself, by as many processes as wanted."""

import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.data.assemble import Assembler
from tlite_jax.data.corpus import Corpus
from tlite_jax.data.preparation import Preparation
from tlite_jax.data.splits import held_out
from tlite_jax.data.workers import run_tasks

Bools = npt.NDArray[np.bool_]

# Fewer tokens than this are written sooner than worker processes start.
SMALL_TOKENS = 1 << 25
_MEMBERS = "members.bin"


@dataclass(frozen=True)
class _Bucket:
    """A bucket to write: its number, name, and which of the sorted members are its documents."""

    number: int
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class _Writer:
    """What writes buckets, in any process: documents are read from the corpus's directory."""

    preparation: Preparation
    corpus: Corpus

    def __getstate__(self) -> dict[str, Any]:
        return {"preparation": self.preparation, "corpus": self.corpus}

    @cached_property
    def _assembler(self) -> Assembler:
        data, tokenizer = self.preparation.data, self.preparation.tokenizer
        return Assembler(self.corpus, data.buckets, sequence_length=data.sequence_length, pad_id=tokenizer.pad_id)

    def write(self, bucket: _Bucket) -> str:
        """Splits a bucket's documents and writes it; returns its manifest's digest."""
        path = self.corpus.directory / _MEMBERS
        documents = np.empty(0, np.int64)
        if bucket.end > bucket.start:
            shape = (bucket.end - bucket.start,)
            documents = np.memmap(path, np.int64, mode="r", offset=bucket.start * 8, shape=shape)
        if self.corpus.keys[bucket.number].never_trained:
            aside = np.ones(len(documents), bool)
        else:
            aside = held_out(self.corpus.table["hash"][documents], self.preparation.todo.held_out)
        # One that a killed process had finished.
        shutil.rmtree(self.preparation.buckets / bucket.name, ignore_errors=True)
        return self._assembler.write(bucket.number, bucket.name, documents[~aside], documents[aside])


def write_buckets(
    preparation: Preparation,
    corpus: Corpus,
    names: Sequence[str],
    stays: Bools,
    progress: Callable[[str, int, int], None],
) -> dict[str, str]:
    """Writes every bucket, those too whose documents were all duplicates.

    Args:
      preparation, corpus: what is written.
      names: the directory of each of the corpus's buckets.
      stays: bool [documents], false where another document stays in its place.
      progress: called with (stage, done, total).

    Returns:
      bucket name -> its manifest's digest.
    """
    documents = np.flatnonzero(stays)
    bucket = corpus.bucket[documents]
    order = np.argsort(bucket, kind="stable")
    documents[order].tofile(corpus.directory / _MEMBERS)
    edges = np.searchsorted(bucket[order], np.arange(len(names) + 1)).tolist()
    buckets = [_Bucket(number, name, edges[number], edges[number + 1]) for number, name in enumerate(names)]
    writer = _Writer(preparation, corpus)
    small = int(corpus.table["tokens"].sum()) < SMALL_TOKENS
    if preparation.num_workers == 1 or len(buckets) == 1 or small:
        digests = []
        for done, todo in enumerate(buckets, 1):
            digests.append(writer.write(todo))
            progress("writing buckets", done, len(buckets))
    else:
        digests = run_tasks(
            _write_here,
            buckets,
            preparation.num_workers,
            lambda done, total: progress("writing buckets", done, total),
            start=_start,
            start_arguments=(writer,),
        )
    return dict(zip(names, digests, strict=True))


_writer: _Writer | None = None


def _start(writer: _Writer) -> None:
    """Prepares a worker process."""
    global _writer
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once and in silence on Ctrl-C
    _writer = writer


def _write_here(bucket: _Bucket) -> str:
    assert _writer is not None
    return _writer.write(bucket)
