"""The on-disk format of buckets: read, check. `bucket_writer` writes it, `verify` reads every byte of it.

    BUCKETS/manifest.json             names every bucket with its manifest's digest; written last
    BUCKETS/NAME/manifest.json        labels, counts, packing; sizes and crc32c of files and their blocks
    BUCKETS/NAME/tokens.bin           uint32, rows x sequence_length; the highest bit: never a target
    BUCKETS/NAME/rows.bin             24 bytes a row: crc32c of its tokens and of its documents, counts (row_format.ROW)
    BUCKETS/NAME/documents.bin        int64, where each document starts, in tokens from the bucket's first row
    BUCKETS/NAME/held_out.bin         uint32, tokens of the held-out documents, one after another
    BUCKETS/NAME/held_out_sizes.bin   int64, documents x (tokens, UTF-8 bytes of text)

All integers are little-endian. A directory without BUCKETS/manifest.json is unfinished and is not read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tlite_jax.config import digest
from tlite_jax.data.bucket_writer import FILES, MANIFEST
from tlite_jax.data.files import check_size, map_array, read_json
from tlite_jax.data.mixture import BucketInfo
from tlite_jax.data.row_format import (
    OFFSET,
    READABLE_VERSIONS,
    ROW,
    TOKEN,
    UNSCORED,
    DamagedRowError,
    Ints,
    RowReader,
    RowsOfVersion1,
    RowsOfVersion2,
    Tokens,
    plain,
)
from tlite_jax.errors import UserError


class HeldOutDocument(NamedTuple):
    """A document set aside.

    Attributes:
      tokens: uint32, document_start and document_end included.
      num_bytes: UTF-8 bytes of its scored text.
      scored: bool, which tokens are; None: all of them.
    """

    tokens: Tokens
    num_bytes: int
    scored: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class HeldOutBucket:
    """A bucket's held-out documents; `never_trained` when its whole source is held out."""

    name: str
    labels: dict[str, str]
    never_trained: bool
    documents: Sequence[HeldOutDocument]


_TRAINED_ON = ("tokens.bin", "documents.bin")


@dataclass(frozen=True)
class Bucket:
    """A bucket on disk, mapped into memory; nothing is read before it is asked for."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Its directory's name."""
        return self.directory.name

    def read_row(self, row: int) -> Tokens:
        """Returns the row's token ids, uint32 [sequence_length], padded where documents do not fill it.

        Raises:
          UserError: the row's bytes are not those that were written.
        """
        out = np.empty(self.manifest["sequence_length"], TOKEN)
        self.read_into(row, out)
        return plain(out)

    def read_into(self, row: int, out: Tokens) -> None:
        """Writes the row's tokens into uint32 [sequence_length], with the UNSCORED bit where one is never a target.

        Raises:
          UserError: the row's bytes are not those that were written.
        """
        assert 0 <= row < self.manifest["rows"], f"bucket {self.name} has no row {row}"
        try:
            self._rows.tokens_into(row, out)
        except DamagedRowError as error:
            raise self._damaged(row, error) from error

    def num_tokens(self, row: int) -> int:
        """Tokens of a row that are not padding."""
        return self._starts(row)[1]

    def documents(self, row: int) -> tuple[Ints, int]:
        """Returns where documents start in the row, int64 tokens from the bucket's first row, and `num_tokens`.

        A document under way when the row begins is not among them. Raises UserError when that has been damaged.
        """
        return self._starts(row)

    def segment_ids(self, row: int) -> npt.NDArray[np.int32]:
        """Returns int32 [sequence_length]: 1 for the row's first document, 2 for the next, 0 for padding."""
        length = self.manifest["sequence_length"]
        starts, num_tokens = self._starts(row)
        # The document that is under way when the row starts is segment 1, wherever it began.
        inner = starts - row * length
        edges = np.concatenate([[0], inner[inner > 0], [num_tokens, length]])
        segments = np.arange(1, len(edges), dtype=np.int32)
        segments[-1] = 0
        return np.repeat(segments, np.diff(edges))

    def held_out(self) -> HeldOutBucket:
        """Reads the held-out documents, checksums verified."""
        tokens = self._map("held_out.bin", TOKEN, verify=True)
        sizes = self._map("held_out_sizes.bin", OFFSET, verify=True).reshape(-1, 2)
        ends = np.cumsum(sizes[:, 0])
        documents = [
            _held_out_document(np.array(tokens[end - size : end]), int(num_bytes))
            for end, (size, num_bytes) in zip(ends, sizes, strict=True)
        ]
        return HeldOutBucket(self.name, dict(self.manifest["labels"]), self.manifest["never_trained"], documents)

    @property
    def packing(self) -> str:
        """How documents were laid into rows: "concatenate" or "best_fit"."""
        return "concatenate" if self.manifest["format_version"] == 1 else self.manifest["packing"]

    def content(self) -> str:
        """Names the bytes that are trained on."""
        files = self.manifest["files"]
        return digest([{key: files[name][key] for key in ("bytes", "crc32c")} for name in _TRAINED_ON])

    @cached_property
    def _rows(self) -> RowReader:
        tokens = self._map("tokens.bin", TOKEN, verify=False)
        if self.manifest["format_version"] == 1:
            checksums = self._map("rows.bin", TOKEN, verify=False)
            whole_documents = partial(self._map, "documents.bin", OFFSET, verify=True)
            return RowsOfVersion1(tokens, checksums, self.manifest["tokens"], whole_documents)
        rows, documents = self._map("rows.bin", ROW, verify=False), self._map("documents.bin", OFFSET, verify=False)
        return RowsOfVersion2(tokens, rows, documents)

    def _starts(self, row: int) -> tuple[Ints, int]:
        try:
            return self._rows.starts(row)
        except DamagedRowError as error:
            raise self._damaged(row, error) from error

    def _damaged(self, row: int, error: DamagedRowError) -> UserError:
        mend = "restore the file or prepare again with --force"
        return UserError(f"bucket {self.name}: row {row} of {self.directory / str(error)} is damaged; {mend}")

    def _map(self, name: str, dtype: np.dtype[Any], *, verify: bool) -> npt.NDArray[Any]:
        # A plain view: slices of np.memmap itself cost more than the row.
        return np.asarray(map_array(self.directory / name, dtype, self.manifest["files"][name], verify=verify))


class BucketStore:
    """All buckets of a finished directory."""

    def __init__(self, directory: Path, manifest: dict[str, Any], buckets: Sequence[Bucket]) -> None:
        self.directory, self.manifest = directory, manifest
        self.buckets = {bucket.name: bucket for bucket in buckets}

    @classmethod
    def open(cls, directory: Path) -> "BucketStore":
        """Opens what `prepare` wrote: manifests and file sizes are checked now, each row when it is read.

        Raises:
          UserError: nothing there, unfinished, another format version, damaged.
        """
        manifest = read_store_manifest(directory)
        if manifest is None:
            raise UserError(f"no finished buckets in {directory}: run `python -m launch prepare CONFIG` first")
        buckets = []
        for name, expected in manifest["buckets"].items():
            values = read_json(directory / name / MANIFEST)
            if digest(values) != expected:
                raise UserError(f"bucket {name} is not the one that {directory} was made with; prepare it again")
            for file, size in values["files"].items():
                check_size(directory / name / file, size)
            buckets.append(Bucket(directory / name, values))
        return cls(directory, manifest, buckets)

    def check(self, *, sequence_length: int, vocab_size: int) -> None:
        """Refuses buckets that a run cannot read: rows of another length, tokens the model does not know.

        Raises:
          UserError: naming what disagrees.
        """
        if self.manifest["sequence_length"] != sequence_length:
            there = f"{self.directory} holds rows of {self.manifest['sequence_length']} tokens"
            raise UserError(f"{there}, data.sequence_length is {sequence_length}; prepare into another directory")
        for bucket in self.buckets.values():
            if bucket.manifest["max_token_id"] >= vocab_size:
                found = f"bucket {bucket.name} holds token {bucket.manifest['max_token_id']}"
                raise UserError(f"{found}, the model's vocab_size is {vocab_size}: prepare with the model's tokenizer")

    def check_masks(self, names: Iterable[str], document_masking: object) -> None:
        """Refuses buckets of packed documents to a run whose attention would cross them.

        Args:
          names: the buckets that a mixture reads.
          document_masking: the run's.

        Raises:
          UserError: naming the first such bucket.
        """
        for name in names:
            if self.buckets[name].packing == "best_fit" and not document_masking:
                mend = "set data.document_masking to best_fit (for such buckets) or true (for all)"
                raise UserError(f"bucket {name} was packed best_fit, whose documents must not mix: {mend}")

    def infos(self) -> tuple[BucketInfo, ...]:
        """What a mixture can draw on: the buckets that have rows to train on."""
        return tuple(
            BucketInfo(b.name, b.manifest["labels"], b.manifest["rows"], b.content())
            for b in self.buckets.values()
            if b.manifest["rows"]
        )


def is_bucket(path: Path) -> bool:
    """Whether a directory is a bucket, whole or not: it holds a bucket's files and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    unfinished = path.name.startswith(".") and path.name.endswith(".partial")
    return (unfinished or "tokens.bin" in names) and names <= {*FILES, MANIFEST, f".{MANIFEST}.partial"}


def read_store_manifest(directory: Path) -> dict[str, Any] | None:
    """Returns the manifest of a finished directory of buckets, None when there is none.

    Raises:
      UserError: damaged, or of another format version.
    """
    if not (directory / MANIFEST).exists():
        return None
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format_version") not in READABLE_VERSIONS:
        found, known = manifest.get("format_version", "unknown"), " and ".join(map(str, READABLE_VERSIONS))
        raise UserError(f"{directory}: buckets of format {found}, this program reads {known}; prepare again")
    return manifest


def read_held_out(directory: Path) -> list[HeldOutBucket]:
    """Reads the held-out documents of every bucket that has some, checksums verified."""
    buckets = BucketStore.open(directory).buckets.values()
    return [bucket.held_out() for bucket in buckets if bucket.manifest["held_out_documents"]]


def _held_out_document(tokens: Tokens, num_bytes: int) -> HeldOutDocument:
    scored = tokens < UNSCORED
    return HeldOutDocument(plain(tokens), num_bytes, None if scored.all() else scored)
