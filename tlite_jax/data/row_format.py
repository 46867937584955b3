"""Rows of tokens as bytes: what a token, a row's record and a document's start are, in both format versions.

Version 2. A token is a uint32 whose highest bit, UNSCORED, says that it is never a target: padding, the prompt of a
chat, the first token of a document that was packed whole. A row's record holds two crc32c: of its tokens, and of the
documents that start in it together with the record's own counts. So whatever of a row is used has been checked,
however large the bucket, without reading more of it.

Version 1, which is still read: no bit, rows.bin holds one crc32c per row, documents.bin is checked whole.
"""

import struct
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
TOKEN, OFFSET = np.dtype("<u4"), np.dtype("<i8")
UNSCORED = np.uint32(1 << 31)
TOKEN_BITS = np.uint32(UNSCORED - 1)
ROW = np.dtype(
    [
        ("tokens_crc32c", "<u4"),
        ("index_crc32c", "<u4"),
        ("first_document", "<i8"),  # of documents.bin that starts in this row or after it
        ("num_documents", "<u4"),  # that start in this row
        ("num_tokens", "<u4"),  # that are not padding
    ]
)

Tokens = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]


class DamagedRowError(Exception):
    """A row whose bytes are not those that were written: (file, what of it)."""


class RowReader(Protocol):
    """Reads a bucket's rows, checked; rows are numbered from 0."""

    def tokens_into(self, row: int, out: Tokens) -> None:
        """Writes the row's tokens with their UNSCORED bits into uint32 [T]. Raises DamagedRowError."""

    def starts(self, row: int) -> tuple[Ints, int]:
        """Returns where documents start in the row, counted from the bucket's first row, and its tokens but padding."""


def row_checksums(rows: Tokens) -> list[int]:
    """Returns the crc32c of each row of contiguous uint32 [rows, T]."""
    return [google_crc32c.value(row) for row in np.ascontiguousarray(rows, TOKEN)]


def row_records(rows: Tokens, starts: Ints, num_tokens: Ints, *, first_row: int, first_document: int) -> npt.NDArray:
    """Returns the records of consecutive rows, ROW [rows].

    Args:
      rows: uint32 [rows, T], UNSCORED bits included.
      starts: int64, where documents start in these rows, ascending, counted in tokens from the bucket's first row.
      num_tokens: int64 [rows], tokens that are not padding.
      first_row: number of the first of these rows.
      first_document: number of the first of these starts.
    """
    count, length = rows.shape
    edges = np.searchsorted(starts, (first_row + np.arange(count + 1)) * length)
    records = np.zeros(count, ROW)
    records["tokens_crc32c"] = row_checksums(rows)
    records["first_document"] = first_document + edges[:-1]
    records["num_documents"] = np.diff(edges)
    records["num_tokens"] = num_tokens
    little = starts.astype(OFFSET)
    records["index_crc32c"] = [
        _index_checksum(little[first:last], int(number), int(tokens))
        for first, last, number, tokens in zip(
            edges[:-1], edges[1:], records["first_document"], num_tokens, strict=True
        )
    ]
    return records


def _index_checksum(starts: Ints, first_document: int, num_tokens: int) -> int:
    """Covers a row's document starts and the counts of its record."""
    return google_crc32c.extend(
        google_crc32c.value(struct.pack("<qII", first_document, len(starts), num_tokens)), starts.tobytes()
    )


class RowsOfVersion2:
    """Reads rows whose records carry both checksums.

    Args:
      tokens: mapped tokens.bin, uint32.
      records: mapped rows.bin, ROW.
      documents: mapped documents.bin, int64.
    """

    def __init__(self, tokens: npt.NDArray[Any], records: npt.NDArray[Any], documents: npt.NDArray[Any]) -> None:
        self._tokens, self._records, self._documents = tokens, records, documents
        self._token_checksums = records["tokens_crc32c"]

    def tokens_into(self, row: int, out: Tokens) -> None:
        """See RowReader."""
        out[:] = self._tokens[row * out.size : (row + 1) * out.size]
        if google_crc32c.value(out) != self._token_checksums[row]:
            raise DamagedRowError("tokens.bin")

    def starts(self, row: int) -> tuple[Ints, int]:
        """See RowReader."""
        record = self._records[row]
        first, num_tokens = int(record["first_document"]), int(record["num_tokens"])
        last = first + int(record["num_documents"])
        if not 0 <= first <= last <= self._documents.size:
            raise DamagedRowError("rows.bin")
        found = np.array(self._documents[first:last])
        if _index_checksum(found, first, num_tokens) != record["index_crc32c"]:
            raise DamagedRowError("documents.bin or rows.bin")
        return found, num_tokens


class RowsOfVersion1:
    """Reads the concatenated rows of format 1; padding gets its UNSCORED bits here.

    Args:
      tokens: mapped tokens.bin, uint32.
      checksums: mapped rows.bin, uint32 [rows].
      num_tokens: of the bucket, without padding.
      documents: reads documents.bin, int64, checked as a whole.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        checksums: npt.NDArray[Any],
        num_tokens: int,
        documents: Callable[[], npt.NDArray[Any]],
    ) -> None:
        self._tokens, self._checksums, self._num_tokens, self._read_documents = tokens, checksums, num_tokens, documents
        self._length = tokens.size // max(1, checksums.size)

    def tokens_into(self, row: int, out: Tokens) -> None:
        """See RowReader."""
        out[:] = self._tokens[row * out.size : (row + 1) * out.size]
        if google_crc32c.value(out) != self._checksums[row]:
            raise DamagedRowError("tokens.bin")
        out[max(0, self._num_tokens - row * out.size) :] |= UNSCORED

    def starts(self, row: int) -> tuple[Ints, int]:
        """See RowReader."""
        start = row * self._length
        first, last = np.searchsorted(self._documents, [start, start + self._length])
        return np.array(self._documents[first:last]), min(self._length, self._num_tokens - start)

    @cached_property
    def _documents(self) -> npt.NDArray[Any]:
        return self._read_documents()[:-1]


def plain(tokens: Tokens) -> Tokens:
    """Returns token ids without their UNSCORED bits."""
    return tokens & TOKEN_BITS
