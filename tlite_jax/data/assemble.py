"""Documents that stay -> bucket directories, one bucket at a time."""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from tlite_jax.data.bucket_writer import BucketWriter
from tlite_jax.data.corpus import Corpus
from tlite_jax.data.packed_rows import write_packed
from tlite_jax.errors import UserError

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.uint32]

# Tokens gathered before they are handed to the writer, and shards mapped at once.
_BATCH_TOKENS, _OPEN_SHARDS = 1 << 21, 256


class Assembler:
    """Writes buckets from a corpus; the tokens of each document are verified when they are read."""

    def __init__(self, corpus: Corpus, directory: Path, *, sequence_length: int, pad_id: int) -> None:
        self._corpus, self._directory = corpus, directory
        self._sequence_length, self._pad_id = sequence_length, pad_id
        self._open: OrderedDict[int, Tokens] = OrderedDict()

    def write(self, number: int, name: str, training: Ints, held_out: Ints) -> str:
        """Writes bucket `number` of the corpus from document numbers; returns its manifest's digest."""
        key = self._corpus.keys[number]
        sizes = self._corpus.table["bytes"]
        length, pad_id = self._sequence_length, self._pad_id
        with BucketWriter(self._directory, name, sequence_length=length, pad_id=pad_id, packing=key.packing) as writer:
            if key.packing == "best_fit":
                lengths = self._corpus.table["tokens"][training].astype(np.int64)
                write_packed(writer, lengths, partial(self._tokens_of, training), text_bytes=int(sizes[training].sum()))
            else:
                self._concatenate(writer, training)
            for document in held_out:
                writer.append_held_out(self._tokens(document), int(sizes[document]))
            return writer.close(dict(key.labels), never_trained=key.never_trained)

    def _concatenate(self, writer: BucketWriter, training: Ints) -> None:
        sizes = self._corpus.table["bytes"]
        for documents in self._batches(training):
            pieces = [self._tokens(document) for document in documents]
            lengths = np.array([piece.size for piece in pieces], np.int64)
            writer.append(np.concatenate(pieces), lengths, int(sizes[documents].sum()))

    def _batches(self, documents: Ints) -> Iterator[Ints]:
        """Cuts a list of documents so that each part has about _BATCH_TOKENS tokens."""
        if documents.size:
            part = np.cumsum(self._corpus.table["tokens"][documents]) // _BATCH_TOKENS
            yield from np.split(documents, np.flatnonzero(np.diff(part)) + 1)

    def _tokens_of(self, documents: Ints, number: int) -> Tokens:
        return self._tokens(int(documents[number]))

    def _tokens(self, document: int) -> Tokens:
        shard, start = int(self._corpus.shard[document]), int(self._corpus.start[document])
        record = self._corpus.table[document]
        tokens = self._shard(shard)[start : start + int(record["tokens"])]
        if google_crc32c.value(tokens.tobytes()) != record["crc32c"]:
            damaged = self._corpus.shards[shard].directory
            raise UserError(f"{damaged}/tokens.bin is damaged; remove {damaged} and start again")
        return tokens

    def _shard(self, number: int) -> Tokens:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        tokens = self._corpus.shards[number].tokens()
        self._open[number] = tokens
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return tokens
