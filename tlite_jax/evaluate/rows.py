"""Documents -> windows of tokens -> rows to score, packed so that little of a row is padding. Host arithmetic only.

A document's text tokens are cut into windows of at most a row; every text token is scored once, given what stands
before it in its window, and each window begins with the token before it. Windows of any documents share a row behind
a document mask.

Shapes: B rows, T tokens.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tlite_jax.data.buckets import HeldOutBucket, HeldOutDocument
from tlite_jax.loss import IGNORED

Ints = npt.NDArray[np.int32]


class Window(NamedTuple):
    """Tokens that are scored together: input t predicts target t; `owner` is the number of the bucket."""

    owner: int
    inputs: Ints
    targets: Ints


class Batch(NamedTuple):
    """Rows to score [B, T] int32; `owner` is a bucket's number where a target is scored, -1 elsewhere."""

    tokens: Ints
    targets: Ints
    segment_ids: Ints
    owner: Ints


class Packing:
    """Windows dealt into rows of `length` tokens: the longest first, each into the fullest row that has room."""

    def __init__(self, windows: Sequence[Window], length: int):
        self.windows, self.length = windows, length
        self.rows = _best_fit([len(window.inputs) for window in windows], length)
        self.num_scored = sum(int(np.count_nonzero(window.targets != IGNORED)) for window in windows)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def batch(self, first: int, size: int) -> Batch:
        """Rows first, first + 1, ... of it; empty rows where it ends."""
        result = Batch(
            tokens=np.zeros((size, self.length), np.int32),
            targets=np.full((size, self.length), IGNORED, np.int32),
            segment_ids=np.zeros((size, self.length), np.int32),
            owner=np.full((size, self.length), -1, np.int32),
        )
        for row, members in enumerate(self.rows[first : first + size]):
            start = 0
            for segment, number in enumerate(members, start=1):
                window = self.windows[number]
                span = slice(start, start + len(window.inputs))
                result.tokens[row, span], result.targets[row, span] = window.inputs, window.targets
                result.segment_ids[row, span] = segment
                result.owner[row, span] = np.where(window.targets != IGNORED, window.owner, -1)
                start = span.stop
        return result


class Boundaries(NamedTuple):
    """Ids that mark where a document starts and ends, or None; they are context, and are not scored."""

    start: int | None
    end: int | None

    def text_windows(self, owner: int, document: HeldOutDocument, length: int) -> list[Window]:
        """Windows that score each text token of a document once; of a chat, those of its answers.

        Where there is no start, `end` stands before the first token, as it does in training; without either, the first
        token has no context, cannot be scored, and stands for itself.
        """
        tokens = document.tokens.astype(np.int32)
        scored = np.ones(len(tokens), bool) if document.scored is None else document.scored
        if self.end is not None and len(tokens) and tokens[-1] == self.end:
            tokens, scored = tokens[:-1], scored[:-1]
        if self.start is None and len(tokens):
            tokens = np.concatenate([[tokens[0] if self.end is None else self.end], tokens]).astype(np.int32)
            scored = np.concatenate([[False], scored])
        inputs, targets = tokens[:-1], np.where(scored[1:], tokens[1:], IGNORED).astype(np.int32)
        return [
            Window(owner, inputs[first : first + length], targets[first : first + length])
            for first in range(0, len(inputs), length)
        ]


def choose(bucket: HeldOutBucket, max_tokens: int | None, max_bytes: int | None) -> list[HeldOutDocument]:
    """The documents of a bucket that fit into a budget, in order, those too long for what is left passed over.

    At least one document is chosen: the smallest. Only `max_bytes` chooses the same documents for every tokenizer.
    """
    chosen: Iterable[HeldOutDocument] = bucket.documents
    if max_tokens is not None:
        chosen = _within(chosen, [len(document.tokens) for document in chosen], max_tokens)
    if max_bytes is not None:
        chosen = list(chosen)
        chosen = _within(chosen, [document.num_bytes for document in chosen], max_bytes)
    return list(chosen)


def _within(documents: Iterable[HeldOutDocument], sizes: Sequence[int], budget: int) -> list[HeldOutDocument]:
    chosen, left = [], budget
    for document, size in zip(documents, sizes, strict=True):
        if size <= left:
            chosen.append(document)
            left -= size
    if chosen or not sizes:
        return chosen
    return [min(zip(documents, sizes, strict=True), key=lambda pair: pair[1])[0]]


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of the windows in each row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        place = bisect.bisect_left(room, (size, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(number)
        if left > size:
            bisect.insort(room, (left - size, row))
    return rows
