"""Writes one bucket: documents concatenated and cut into rows, or whole documents that were packed into rows."""

import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np

from tlite_jax.config import digest
from tlite_jax.data.blocks import BlockFile
from tlite_jax.data.files import ChecksummedFile, sync, write_json
from tlite_jax.data.row_format import FORMAT_VERSION, OFFSET, TOKEN, UNSCORED, Ints, Tokens, plain, row_records

MANIFEST = "manifest.json"
FILES = ("tokens.bin", "rows.bin", "documents.bin", "held_out.bin", "held_out_sizes.bin")
# Rows are checksummed and written this many tokens at a time.
_FLUSH_TOKENS = 1 << 20


class BucketWriter:
    """Writes one bucket under a temporary name; `close` makes it whole and gives it its own. A context manager.

    Tokens are uint32 with the UNSCORED bit where a token is never a target.
    """

    def __init__(
        self, parent: Path, name: str, *, sequence_length: int, pad_id: int, packing: str = "concatenate"
    ) -> None:
        self._final, self._directory = parent / name, parent / f".{name}.partial"
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        self.sequence_length, self._packing = sequence_length, packing
        self._padding = np.uint32(pad_id) | UNSCORED
        # tokens.bin has a checksum for each row, which says more than one for each block.
        self._files: dict[str, ChecksummedFile] = {
            name: (ChecksummedFile if name == "tokens.bin" else BlockFile)(self._directory / name) for name in FILES
        }
        self._tokens: list[Tokens] = []
        self._starts: list[Ints] = []
        self._pending_tokens = self._pieces = 0
        self._counts = dict.fromkeys(
            ("rows", "tokens", "scored_tokens", "padding_tokens", "documents", "split_documents", "text_bytes"), 0
        )
        self._held_out = dict.fromkeys(("held_out_documents", "held_out_tokens", "held_out_text_bytes"), 0)
        self._max_token_id = -1

    def __enter__(self) -> Self:
        """Left before `close`, the bucket is abandoned."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.abandon()

    def append(self, tokens: Tokens, lengths: Ints, num_bytes: int) -> None:
        """Adds documents to train on after those before, across rows.

        Args:
          tokens: uint32 [sum of lengths], the documents one after another.
          lengths: int64 [documents], tokens of each, at least 1.
          num_bytes: UTF-8 bytes of their text.
        """
        assert self._packing == "concatenate"
        assert lengths.sum() == tokens.size
        self._starts.append(self._counts["tokens"] + np.cumsum(lengths) - lengths)
        self._count(tokens, tokens.size, documents=lengths.size, text_bytes=num_bytes)
        for start in range(0, tokens.size, _FLUSH_TOKENS):
            piece = tokens[start : start + _FLUSH_TOKENS]
            self._tokens.append(piece)
            self._pending_tokens += piece.size
            if self._pending_tokens >= _FLUSH_TOKENS:
                self._flush()

    def append_rows(self, rows: Tokens, starts: Ints, num_tokens: Ints) -> None:
        """Adds whole rows of packed documents.

        Args:
          rows: uint32 [rows, T], padding after each row's tokens (any id; it becomes the bucket's own).
          starts: int64, where pieces of documents start, in tokens from the first of these rows, ascending.
          num_tokens: int64 [rows].
        """
        assert self._packing == "best_fit"
        is_padding = np.arange(self.sequence_length) >= num_tokens[:, None]
        rows = np.where(is_padding, self._padding, rows).astype(TOKEN)
        flat = rows.reshape(-1)
        # A document's first token follows another document's last one, which says nothing of it.
        flat[starts] |= UNSCORED
        self._count(rows[~is_padding], int(num_tokens.sum()))
        self._counts["padding_tokens"] += int(is_padding.sum())
        self._write_rows(rows, starts + self._counts["rows"] * self.sequence_length, num_tokens)

    def count_documents(self, documents: int, *, split: int, text_bytes: int) -> None:
        """Notes what `append_rows` was given: documents, those cut because a row was too short, bytes of text."""
        for name, amount in (("documents", documents), ("split_documents", split), ("text_bytes", text_bytes)):
            self._counts[name] += amount

    def append_held_out(self, tokens: Tokens, num_bytes: int) -> None:
        """Adds a document to evaluate on; `num_bytes` of text are scored."""
        self._note_ids(tokens)
        self._files["held_out.bin"].write(tokens.astype(TOKEN).tobytes())
        self._files["held_out_sizes.bin"].write(np.array([tokens.size, num_bytes], OFFSET).tobytes())
        for name, amount in zip(self._held_out, (1, tokens.size, num_bytes), strict=True):
            self._held_out[name] += amount

    def close(self, labels: dict[str, str], *, never_trained: bool) -> str:
        """Pads the last row, makes everything durable and renames. Returns the manifest's digest."""
        if self._packing == "concatenate":
            padding = -self._counts["tokens"] % self.sequence_length
            self._tokens.append(np.full(padding, self._padding, TOKEN))
            self._counts["padding_tokens"] = padding
            self._flush()
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "name": self._final.name,
            "labels": labels,
            "never_trained": never_trained,
            "packing": self._packing,
            "sequence_length": self.sequence_length,
            **self._counts,
            "pieces": self._pieces,
            **self._held_out,
            "max_token_id": self._max_token_id,
            "files": {name: file.close() for name, file in self._files.items()},
        }
        write_json(self._directory / MANIFEST, manifest)
        self._directory.rename(self._final)
        sync(self._final.parent)
        return digest(manifest)

    def _count(self, tokens: Tokens, size: int, *, documents: int = 0, text_bytes: int = 0) -> None:
        self._note_ids(tokens)
        self._counts["tokens"] += size
        self._counts["scored_tokens"] += int(np.count_nonzero(tokens < UNSCORED))
        self._counts["documents"] += documents
        self._counts["text_bytes"] += text_bytes

    def _note_ids(self, tokens: Tokens) -> None:
        if tokens.size:
            self._max_token_id = max(self._max_token_id, int(plain(tokens).max()))

    def _flush(self) -> None:
        """Writes the whole rows of what was concatenated, and keeps the rest."""
        tokens = np.concatenate(self._tokens).astype(TOKEN, copy=False)
        starts = np.concatenate([*self._starts, np.empty(0, np.int64)])
        count = tokens.size // self.sequence_length
        first, whole = self._counts["rows"], count * self.sequence_length
        num_tokens = np.clip(
            self._counts["tokens"] - (first + np.arange(count)) * self.sequence_length, 0, self.sequence_length
        )
        written = np.searchsorted(starts, (first + count) * self.sequence_length)
        self._write_rows(tokens[:whole].reshape(count, self.sequence_length), starts[:written], num_tokens)
        self._tokens, self._pending_tokens = [tokens[whole:]], tokens.size - whole
        self._starts = [starts[written:]]

    def _write_rows(self, rows: Tokens, starts: Ints, num_tokens: Ints) -> None:
        first = self._counts["rows"]
        records = row_records(rows, starts, num_tokens, first_row=first, first_document=self._pieces)
        self._files["tokens.bin"].write(rows.tobytes())
        self._files["rows.bin"].write(records.tobytes())
        self._files["documents.bin"].write(starts.astype(OFFSET).tobytes())
        self._counts["rows"] += len(rows)
        self._pieces += starts.size
