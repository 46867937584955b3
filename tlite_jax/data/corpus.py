"""All tokenised shards seen as one table of documents: about 100 bytes of memory a document, whatever its length."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.config import digest
from tlite_jax.data.documents import Shard
from tlite_jax.data.shards import TokenizedShard

Ints = npt.NDArray[np.int64]

# No user means to have more; each is a directory and a leaf of the mixture.
MAX_BUCKETS = 20_000


@dataclass(frozen=True)
class BucketKey:
    """What makes a bucket: labels, and whether its documents may be trained on."""

    labels: tuple[tuple[str, str], ...]
    never_trained: bool


@dataclass
class Corpus:
    """Documents by number, in the order of sources, files and lines.

    Attributes:
      shards: where their tokens lie.
      shard: int64 [documents], index into `shards`.
      start: int64 [documents], first token in the shard.
      table: the shards' records, joined.
      bucket: int64 [documents], index into `keys`.
      keys: the buckets, in order of appearance.
      quarantined: by source name, how often each reason occurred.
      locations: of each shard's pieces, path and the lines before the piece.
    """

    shards: list[TokenizedShard]
    shard: Ints
    start: Ints
    table: npt.NDArray[Any]
    bucket: Ints
    keys: list[BucketKey]
    quarantined: dict[str, dict[str, int]]
    locations: list[list[tuple[str, int]]]
    _signatures: dict[int, npt.NDArray[np.uint32]] = field(default_factory=dict)

    def place(self, document: int) -> str:
        """A document's file and line, as `path:line`."""
        path, before = self.locations[self.shard[document]][self.table["piece"][document]]
        return f"{path}:{before + self.table['line'][document]}"

    def never_trained(self) -> npt.NDArray[np.bool_]:
        """Whether each document's source is wholly held out, bool [documents]."""
        return np.array([key.never_trained for key in self.keys], bool)[self.bucket]

    def signature(self, document: int, num_permutations: int) -> npt.NDArray[np.uint32]:
        """A document's MinHash signature."""
        number = int(self.shard[document])
        if number not in self._signatures:
            self._signatures[number] = self.shards[number].signatures(num_permutations)
        return self._signatures[number][document - np.searchsorted(self.shard, number)]


def join(shards: Sequence[Shard], done: Sequence[TokenizedShard]) -> Corpus:
    """Joins the tables of tokenised shards, given in the order of the input."""
    keys: dict[BucketKey, int] = {}
    quarantined: dict[str, dict[str, int]] = {}
    tables, buckets, numbers, starts = [], [], [], []
    for number, (shard, tokenized) in enumerate(zip(shards, done, strict=True)):
        table = tokenized.table()
        found = [
            keys.setdefault(BucketKey(tuple(labels.items()), not shard.source.training), len(keys))
            for labels in tokenized.labels
        ]
        tables.append(table)
        buckets.append(np.array(found, np.int64)[table["labels"]] if len(table) else np.empty(0, np.int64))
        numbers.append(np.full(len(table), number))
        starts.append(np.cumsum(table["tokens"]) - table["tokens"])
        reasons = quarantined.setdefault(shard.source.name, {})
        for record in tokenized.quarantined():
            reasons[record["reason"]] = reasons.get(record["reason"], 0) + 1
    return Corpus(
        shards=list(done),
        shard=np.concatenate(numbers),
        start=np.concatenate(starts),
        table=np.concatenate(tables),
        bucket=np.concatenate(buckets),
        keys=list(keys),
        quarantined=quarantined,
        locations=_locations(shards, done),
    )


def write_quarantine(path: Path, shards: Sequence[Shard], corpus: Corpus) -> None:
    """Lists every bad document: source, file, line, reason; one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for shard, tokenized, locations in zip(shards, corpus.shards, corpus.locations, strict=True):
            for record in tokenized.quarantined():
                name, before = locations[record["piece"]]
                line = {"source": shard.source.name, "file": name, "line": before + record["line"]}
                file.write(json.dumps({**line, "reason": record["reason"]}, ensure_ascii=False) + "\n")


def bucket_names(keys: Sequence[BucketKey]) -> list[str]:
    """Readable, distinct directory names: the labels' values, and a hash where that would not tell them apart."""
    plain = [".".join(value for _, value in key.labels) or "all" for key in keys]
    # Case-insensitive file systems hold only one of two names that differ in case.
    count = Counter(name.lower() for name in plain)
    names = []
    for key, name in zip(keys, plain, strict=True):
        safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", name).lstrip(".")[:80]
        tells_apart = safe == name and count[name.lower()] == 1 and not name.lower().endswith((".json", ".jsonl"))
        names.append(name if tells_apart else f"{safe}-{digest([key.labels, key.never_trained])[:8]}")
    return names


def _locations(shards: Sequence[Shard], done: Sequence[TokenizedShard]) -> list[list[tuple[str, int]]]:
    """Where the pieces of a file begin, in lines: pieces come in the order of the file."""
    lines: dict[tuple[str, str], int] = {}
    result = []
    for shard, tokenized in zip(shards, done, strict=True):
        here = []
        for piece, count in zip(shard.pieces, tokenized.manifest["lines"], strict=True):
            file = (shard.source.name, piece.file.path)
            here.append((piece.file.path, lines.get(file, 0)))
            lines[file] = lines.get(file, 0) + count
        result.append(here)
    return result


def by_bucket(bucket: Ints, count: int) -> Iterator[Ints]:
    """Yields the documents of each bucket 0..count-1 in ascending order."""
    order = np.argsort(bucket, kind="stable")
    edges = np.searchsorted(bucket[order], np.arange(count + 1))
    for first, last in itertools.pairwise(edges):
        yield order[first:last]
