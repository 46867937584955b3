"""Whole documents -> rows of a bucket, best fit; a few rows' tokens in memory at a time."""

from collections.abc import Callable

import numpy as np

from tlite_jax.data.bucket_writer import BucketWriter
from tlite_jax.data.packing import Packing, best_fit
from tlite_jax.data.row_format import TOKEN, Ints, Tokens

# Tokens gathered before they are handed to the writer.
_BATCH_TOKENS = 1 << 21


def write_packed(writer: BucketWriter, lengths: Ints, tokens_of: Callable[[int], Tokens], *, text_bytes: int) -> None:
    """Packs documents and writes their rows.

    Args:
      writer: of a bucket whose packing is best_fit.
      lengths: int64 [documents], tokens of each.
      tokens_of: document number -> its tokens, uint32 with UNSCORED bits; called once for each piece of a document.
      text_bytes: UTF-8 bytes of their text.
    """
    length = writer.sequence_length
    packing = best_fit(lengths, length)
    rows_at_once = max(1, _BATCH_TOKENS // length)
    for first in range(0, packing.num_rows, rows_at_once):
        _write_rows(writer, packing, tokens_of, first, min(first + rows_at_once, packing.num_rows))
    writer.count_documents(len(lengths), split=packing.split, text_bytes=text_bytes)


def _write_rows(
    writer: BucketWriter, packing: Packing, tokens_of: Callable[[int], Tokens], first: int, last: int
) -> None:
    length = writer.sequence_length
    inside = slice(*np.searchsorted(packing.row, [first, last]).tolist())
    places = (packing.row[inside] - first) * length + packing.start[inside]
    flat = np.zeros((last - first) * length, TOKEN)
    pieces = zip(
        places.tolist(),
        packing.document[inside].tolist(),
        packing.offset[inside].tolist(),
        packing.length[inside].tolist(),
        strict=True,
    )
    for place, document, offset, size in pieces:
        flat[place : place + size] = tokens_of(document)[offset : offset + size]
    used = np.bincount(packing.row[inside] - first, packing.length[inside], minlength=last - first)
    writer.append_rows(flat.reshape(last - first, length), places, used.astype(np.int64))
