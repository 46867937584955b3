"""The on-disk format of buckets: write, read, verify.

    BUCKETS/manifest.json             names every bucket with its manifest's digest; written last
    BUCKETS/NAME/manifest.json        labels, counts, sizes and crc32c of the files beside it
    BUCKETS/NAME/tokens.bin           uint32, rows x sequence_length; the last row is padded
    BUCKETS/NAME/rows.bin             uint32, crc32c of each row, checked on every read
    BUCKETS/NAME/documents.bin        int64, where each document starts in the stream of tokens, then its end
    BUCKETS/NAME/held_out.bin         uint32, tokens of the held-out documents, one after another
    BUCKETS/NAME/held_out_sizes.bin   int64, documents x (tokens, UTF-8 bytes of text)

All integers are little-endian. A directory without BUCKETS/manifest.json is unfinished and is not read.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from tlite_jax.config import digest
from tlite_jax.data.files import ChecksummedFile, check_size, map_array, read_json, sync_directory, write_json
from tlite_jax.data.mixture import BucketInfo
from tlite_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = ("tokens.bin", "rows.bin", "documents.bin", "held_out.bin", "held_out_sizes.bin")
TOKEN, OFFSET = np.dtype("<u4"), np.dtype("<i8")
# Rows are checksummed and written this many tokens at a time.
_FLUSH_TOKENS = 1 << 20

Tokens = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]


class HeldOutDocument(NamedTuple):
    """A document set aside: its tokens (document_start and document_end included) and its text's UTF-8 bytes."""

    tokens: Tokens
    num_bytes: int


@dataclass(frozen=True)
class HeldOutBucket:
    """A bucket's held-out documents; `never_trained` when its whole source is held out."""

    name: str
    labels: dict[str, str]
    never_trained: bool
    documents: Sequence[HeldOutDocument]


class BucketWriter:
    """Writes one bucket under a temporary name; `close` makes it whole and gives it its own. A context manager."""

    def __init__(self, parent: Path, name: str, *, sequence_length: int, pad_id: int) -> None:
        self._final, self._directory = parent / name, parent / f".{name}.partial"
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        self._sequence_length, self._pad_id = sequence_length, pad_id
        self._files = {name: ChecksummedFile(self._directory / name) for name in FILES}
        self._pending: list[Tokens] = []
        self._pending_tokens = self._tokens = self._rows = self._documents = 0
        self._text_bytes = self._held_out_documents = self._held_out_tokens = self._held_out_bytes = 0
        self._max_token_id = -1

    def __enter__(self) -> Self:
        """Left before `close`, the bucket is abandoned."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.abandon()

    def append(self, tokens: Tokens, lengths: Ints, num_bytes: int) -> None:
        """Adds documents to train on.

        Args:
          tokens: uint32 [sum of lengths], the documents one after another.
          lengths: int64 [documents], tokens of each, at least 1.
          num_bytes: UTF-8 bytes of their text.
        """
        assert lengths.sum() == tokens.size
        starts = self._tokens + np.cumsum(lengths) - lengths
        self._files["documents.bin"].write(starts.astype(OFFSET).tobytes())
        self._documents += lengths.size
        self._text_bytes += num_bytes
        self._tokens += tokens.size
        self._note_ids(tokens)
        for start in range(0, tokens.size, _FLUSH_TOKENS):
            piece = tokens[start : start + _FLUSH_TOKENS]
            self._pending.append(piece)
            self._pending_tokens += piece.size
            if self._pending_tokens >= _FLUSH_TOKENS:
                self._flush()

    def append_held_out(self, tokens: Tokens, num_bytes: int) -> None:
        """Adds a document to evaluate on."""
        self._note_ids(tokens)
        self._files["held_out.bin"].write(tokens.astype(TOKEN).tobytes())
        self._files["held_out_sizes.bin"].write(np.array([tokens.size, num_bytes], OFFSET).tobytes())
        self._held_out_documents += 1
        self._held_out_tokens += tokens.size
        self._held_out_bytes += num_bytes

    def close(self, labels: dict[str, str], *, never_trained: bool) -> str:
        """Pads the last row, makes everything durable and renames. Returns the manifest's digest."""
        padding = -self._tokens % self._sequence_length
        self._pending.append(np.full(padding, self._pad_id, TOKEN))
        self._flush()
        self._files["documents.bin"].write(np.array([self._tokens], OFFSET).tobytes())
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": self._final.name,
            "labels": labels,
            "never_trained": never_trained,
            "sequence_length": self._sequence_length,
            "rows": self._rows,
            "tokens": self._tokens,
            "padding_tokens": padding,
            "documents": self._documents,
            "text_bytes": self._text_bytes,
            "held_out_documents": self._held_out_documents,
            "held_out_tokens": self._held_out_tokens,
            "held_out_text_bytes": self._held_out_bytes,
            "max_token_id": self._max_token_id,
            "files": {name: file.close() for name, file in self._files.items()},
        }
        write_json(self._directory / MANIFEST, manifest)
        self._directory.rename(self._final)
        sync_directory(self._final.parent)
        return digest(manifest)

    def _note_ids(self, tokens: Tokens) -> None:
        if tokens.size:
            self._max_token_id = max(self._max_token_id, int(tokens.max()))

    def _flush(self) -> None:
        tokens = np.concatenate(self._pending).astype(TOKEN, copy=False)
        num_rows = tokens.size // self._sequence_length
        whole = tokens[: num_rows * self._sequence_length]
        checksums = [google_crc32c.value(row.tobytes()) for row in whole.reshape(num_rows, self._sequence_length)]
        self._files["tokens.bin"].write(whole.tobytes())
        self._files["rows.bin"].write(np.array(checksums, TOKEN).tobytes())
        self._rows += num_rows
        self._pending = [tokens[whole.size :]]
        self._pending_tokens = tokens.size - whole.size


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
        """Returns uint32 [sequence_length], padded at the end of the last row.

        Raises:
          UserError: the row's bytes are not those that were written.
        """
        length = self.manifest["sequence_length"]
        assert 0 <= row < self.manifest["rows"], f"bucket {self.name} has no row {row}"
        tokens = np.array(self._token_file[row * length : (row + 1) * length])
        if google_crc32c.value(tokens.tobytes()) != self._row_checksums[row]:
            mend = "restore the file or prepare again with --force"
            raise UserError(f"bucket {self.name}: row {row} of {self.directory / 'tokens.bin'} is damaged; {mend}")
        return tokens

    def num_tokens(self, row: int) -> int:
        """Tokens of a row that are not padding."""
        length = self.manifest["sequence_length"]
        return min(length, self.manifest["tokens"] - row * length)

    def segment_ids(self, row: int) -> npt.NDArray[np.int32]:
        """Returns int32 [sequence_length]: 1 for the row's first document, 2 for the next, 0 for padding."""
        length = self.manifest["sequence_length"]
        start = row * length
        first, last = np.searchsorted(self._document_starts[:-1], [start, start + length], side="left")
        marks = np.zeros(length, np.int32)
        marks[self._document_starts[first:last] - start] = 1
        # The document that is under way when the row starts is segment 1, wherever it began.
        segments = np.cumsum(marks, dtype=np.int32) + 1 - marks[0]
        segments[self.num_tokens(row) :] = 0
        return segments

    def held_out(self) -> HeldOutBucket:
        """Reads the held-out documents, checksums verified."""
        tokens = self._map("held_out.bin", TOKEN, verify=True)
        sizes = self._map("held_out_sizes.bin", OFFSET, verify=True).reshape(-1, 2)
        ends = np.cumsum(sizes[:, 0])
        documents = [
            HeldOutDocument(np.array(tokens[end - size : end]), int(num_bytes))
            for end, (size, num_bytes) in zip(ends, sizes, strict=True)
        ]
        return HeldOutBucket(self.name, dict(self.manifest["labels"]), self.manifest["never_trained"], documents)

    def content(self) -> str:
        """Names the bytes that are trained on."""
        return digest([self.manifest["files"][name] for name in ("tokens.bin", "documents.bin")])

    def verify(self) -> Iterator[str]:
        """Reads every byte; yields one line for each damaged file."""
        for name, expected in self.manifest["files"].items():
            try:
                map_array(self.directory / name, np.uint8, expected, verify=True)
            except UserError as error:
                yield str(error)

    @cached_property
    def _token_file(self) -> npt.NDArray[Any]:
        return self._map("tokens.bin", TOKEN, verify=False)

    @cached_property
    def _row_checksums(self) -> npt.NDArray[Any]:
        return self._map("rows.bin", TOKEN, verify=False)

    @cached_property
    def _document_starts(self) -> npt.NDArray[Any]:
        return self._map("documents.bin", OFFSET, verify=True)

    def _map(self, name: str, dtype: np.dtype[Any], *, verify: bool) -> npt.NDArray[Any]:
        return map_array(self.directory / name, dtype, self.manifest["files"][name], verify=verify)


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
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version", "unknown")
        raise UserError(f"{directory}: buckets of format {found}, this program reads {FORMAT_VERSION}; prepare again")
    return manifest


def read_held_out(directory: Path) -> list[HeldOutBucket]:
    """Reads the held-out documents of every bucket that has some, checksums verified."""
    buckets = BucketStore.open(directory).buckets.values()
    return [bucket.held_out() for bucket in buckets if bucket.manifest["held_out_documents"]]
