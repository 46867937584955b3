"""All tokenised shards seen as one table of documents: 68 bytes of disk a document, whatever its length."""

import json
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.config import digest
from tlite_jax.data.documents import Shard
from tlite_jax.data.shards import TABLE, TokenizedShard

Ints = npt.NDArray[np.int64]

# No user means to have more; each is a directory and a leaf of the mixture.
MAX_BUCKETS = 20_000
# Shards whose signatures are mapped at once.
_OPEN_SHARDS = 256


@dataclass(frozen=True)
class BucketKey:
    """What makes a bucket: labels, whether its documents may be trained on, and how they are laid into rows."""

    labels: tuple[tuple[str, str], ...]
    never_trained: bool
    packing: str


_FILES = {"table.bin": TABLE, "shard.bin": np.dtype("<u4"), "start.bin": np.dtype("<i8"), "bucket.bin": np.dtype("<u4")}


@dataclass(frozen=True)
class Corpus:
    """Documents by number, in the order of sources, files and lines.

    The columns are mapped from files beside the shards, so that a copy of this travels to other processes cheaply and
    memory holds only what is looked at.

    Attributes:
      directory: where the columns lie.
      shards: where the documents' tokens lie.
      first: int64 [shards + 1], the number of each shard's first document; the last is the number of documents.
      keys: the buckets, in order of appearance.
      locations: of each shard's pieces, path and the lines before the piece.
      quarantined: by source name, how often each reason occurred.
      contaminated: by source name and evaluation set, how many documents were dropped and cut.
      label_counts: of the labels that labellers give, how many documents have each value.
      lost_bytes: of the input, those that could not be read.
    """

    directory: Path
    shards: list[TokenizedShard]
    first: Ints
    keys: list[BucketKey]
    locations: list[list[tuple[str, int]]]
    quarantined: dict[str, dict[str, int]]
    contaminated: dict[str, dict[str, dict[str, int]]]
    label_counts: dict[str, dict[str, int]]
    lost_bytes: int

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    def __len__(self) -> int:
        return int(self.first[-1])

    @cached_property
    def table(self) -> npt.NDArray[Any]:
        """The shards' records, joined."""
        return self._map("table.bin")

    @cached_property
    def shard(self) -> npt.NDArray[np.uint32]:
        """uint32 [documents], index into `shards`."""
        return self._map("shard.bin")

    @cached_property
    def start(self) -> Ints:
        """int64 [documents], first token in the shard."""
        return self._map("start.bin")

    @cached_property
    def bucket(self) -> npt.NDArray[np.uint32]:
        """uint32 [documents], index into `keys`."""
        return self._map("bucket.bin")

    def place(self, document: int) -> str:
        """A document's file and line, as `path:line`."""
        path, before = self.locations[self.shard[document]][self.table["piece"][document]]
        return f"{path}:{before + self.table['line'][document]}"

    def never_trained(self) -> npt.NDArray[np.bool_]:
        """Whether each document's source is wholly held out, bool [documents]."""
        return np.array([key.never_trained for key in self.keys], bool)[self.bucket]

    def _map(self, name: str) -> npt.NDArray[Any]:
        return np.memmap(self.directory / name, _FILES[name], mode="r") if len(self) else np.empty(0, _FILES[name])


def join(shards: Sequence[Shard], done: Sequence[TokenizedShard], directory: Path) -> Corpus:
    """Joins the tables of tokenised shards, given in the order of the input; the columns go into a new directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    keys: dict[BucketKey, int] = {}
    quarantined: dict[str, Counter[str]] = {}
    contaminated: dict[str, dict[str, Counter[str]]] = {}
    label_counts: dict[str, Counter[str]] = {}
    counts = [0]
    with ExitStack() as stack:
        files = {name: stack.enter_context((directory / name).open("wb")) for name in _FILES}
        for number, (shard, tokenized) in enumerate(zip(shards, done, strict=True)):
            table = tokenized.table()
            found = [
                keys.setdefault(
                    BucketKey(tuple(labels.items()), not shard.source.training, shard.source.packing), len(keys)
                )
                for labels in tokenized.labels
            ]
            columns = {
                "table.bin": table,
                "shard.bin": np.full(len(table), number),
                "start.bin": np.cumsum(table["tokens"]) - table["tokens"],
                "bucket.bin": np.array(found or [0])[table["labels"]],
            }
            for name, column in columns.items():
                files[name].write(column.astype(_FILES[name], copy=False).tobytes())
            quarantined.setdefault(shard.source.name, Counter()).update(tokenized.reasons)
            sets = contaminated.setdefault(shard.source.name, {})
            for name, actions in tokenized.contaminated.items():
                sets.setdefault(name, Counter()).update(actions)
            for label, values in tokenized.label_counts.items():
                label_counts.setdefault(label, Counter()).update(values)
            counts.append(len(table))
    return Corpus(
        directory=directory,
        shards=list(done),
        first=np.cumsum(counts),
        keys=list(keys),
        locations=_locations(shards, done),
        quarantined={source: dict(sorted(reasons.items())) for source, reasons in quarantined.items()},
        contaminated={
            source: {name: dict(sorted(actions.items())) for name, actions in sorted(sets.items())}
            for source, sets in contaminated.items()
        },
        label_counts={label: dict(sorted(values.items())) for label, values in label_counts.items()},
        lost_bytes=sum(tokenized.manifest["lost_bytes"] for tokenized in done),
    )


class Signatures:
    """The MinHash signatures and their bands of all documents, mapped."""

    def __init__(self, corpus: Corpus, num_permutations: int, num_bands: int) -> None:
        self._corpus, self._num_permutations, self._num_bands = corpus, num_permutations, num_bands
        self._open: OrderedDict[int, npt.NDArray[np.uint32]] = OrderedDict()

    def signature(self, document: int) -> npt.NDArray[np.uint32]:
        """A document's signature, uint32 [num_permutations]."""
        number = int(self._corpus.shard[document])
        if number not in self._open:
            self._open[number] = self._corpus.shards[number].signatures(self._num_permutations)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[number][document - self._corpus.first[number]]

    def band(self, number: int) -> npt.NDArray[np.uint64]:
        """One band of all documents, uint64 [documents]."""
        values = np.empty(len(self._corpus), np.uint64)
        for shard, start, end in zip(self._corpus.shards, self._corpus.first, self._corpus.first[1:], strict=False):
            values[start:end] = shard.bands(self._num_bands, verify=number == 0)[:, number]
        return values


def write_quarantine(path: Path, corpus: Corpus, sources: Sequence[str]) -> None:
    """Lists every bad document: source, file, line, byte offset where known, reason; one JSON object a line."""
    _write_list(path, corpus, sources, TokenizedShard.quarantined)


def write_contamination(path: Path, corpus: Corpus, sources: Sequence[str]) -> None:
    """Lists every document that repeated evaluation items, with what it repeated; one JSON object a line."""
    _write_list(path, corpus, sources, TokenizedShard.contamination)


def _write_list(
    path: Path,
    corpus: Corpus,
    sources: Sequence[str],
    records: Callable[[TokenizedShard], Iterator[dict[str, Any]]],
) -> None:
    with path.open("w", encoding="utf-8") as file:
        for source, tokenized, locations in zip(sources, corpus.shards, corpus.locations, strict=True):
            for record in records(tokenized):
                name, lines = locations[record.pop("piece")]
                line = {"source": source, "file": name, "line": lines + record.pop("line")}
                file.write(json.dumps({**line, **record}, ensure_ascii=False) + "\n")


def bucket_names(keys: Sequence[BucketKey]) -> list[str]:
    """Readable, distinct directory names: the labels' values, and a hash where that would not tell them apart."""
    plain = [".".join(value for _, value in key.labels) or "all" for key in keys]
    # Case-insensitive file systems hold only one of two names that differ in case.
    count = Counter(name.lower() for name in plain)
    names = []
    for key, name in zip(keys, plain, strict=True):
        safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", name).lstrip(".")[:80]
        tells_apart = safe == name and count[name.lower()] == 1 and not name.lower().endswith((".json", ".jsonl"))
        names.append(name if tells_apart else f"{safe}-{digest([key.labels, key.never_trained, key.packing])[:8]}")
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
