"""Best-fit packing: whole documents -> rows, as full as they can be made; pure numbers, no tokens.

Best fit decreasing: the longest piece first, each into the fullest row that it fits. Pieces of one length and rows with
the same room are alike, so they are dealt together: O(n + L^2 / vector) for n pieces of at most L tokens, and it is the
same packing as placing them one by one. Johnson et al., 1974: at most 11/9 of the fewest rows possible; the use for
language models is that of arXiv 2404.10830.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Pieces in the order of rows, and inside a row as they lie there. A document longer than a row has several.

    Attributes:
      document: int64 [pieces], which document.
      offset: int64 [pieces], the piece's first token in its document.
      length: int64 [pieces].
      row: int64 [pieces], ascending.
      start: int64 [pieces], the piece's first token in its row.
      num_rows: rows in all.
    """

    document: Ints
    offset: Ints
    length: Ints
    row: Ints
    start: Ints
    num_rows: int

    @property
    def split(self) -> int:
        """Documents that were cut."""
        return len(np.unique(self.document[self.offset > 0]))


def best_fit(lengths: Ints, capacity: int) -> Packing:
    """Packs documents into rows; the same input gives the same packing.

    Args:
      lengths: int64 [documents], tokens of each, at least 1.
      capacity: tokens of a row. Longer documents fill whole rows, and what is left of them is packed.

    Returns:
      Every token of every document once.
    """
    document, offset, length = _pieces(lengths, capacity)
    row, num_rows = _assign(length, capacity)
    # Longest first in a row, as they were placed; among equals the earlier document.
    order = np.lexsort((np.arange(len(length)), -length, row))
    document, offset, length, row = document[order], offset[order], length[order], row[order]
    before = np.cumsum(length) - length
    first = np.searchsorted(row, row)
    return Packing(document, offset, length, row, before - before[first] if len(row) else before, num_rows)


def _pieces(lengths: Ints, capacity: int) -> tuple[Ints, Ints, Ints]:
    """Cuts documents into pieces of at most `capacity` tokens, the last of each the shorter one."""
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    return document, offset, np.minimum(capacity, lengths[document] - offset)


def _assign(length: Ints, capacity: int) -> tuple[Ints, int]:
    """A row for each piece, and how many rows there are. Rows are numbered as they are opened."""
    row = np.empty(len(length), np.int64)
    by_length = np.argsort(-length, kind="stable")
    sizes, counts = np.unique(-length, return_counts=True)
    with_room: list[list[Ints]] = [[] for _ in range(capacity + 1)]  # room -> rows that have it
    room_counts = np.zeros(capacity + 1, np.int64)
    num_rows = first = 0
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        pieces = by_length[first : first + count]
        first += count
        for room in (size + np.flatnonzero(room_counts[size:])).tolist():
            if not len(pieces):
                break
            fit = room // size  # having taken one it is the fullest that fits, so it takes the next
            rows = _take(with_room, room_counts, room, -(-len(pieces) // fit))
            pieces = _place(row, pieces, rows, fit, room, size, with_room, room_counts)
        if len(pieces):
            fit = capacity // size
            rows = np.arange(num_rows, num_rows - (-len(pieces) // fit))
            num_rows += len(rows)
            _place(row, pieces, rows, fit, capacity, size, with_room, room_counts)
    return row, num_rows


def _take(with_room: list[list[Ints]], room_counts: Ints, room: int, wanted: int) -> Ints:
    """Removes up to `wanted` rows of some room, those opened into it first."""
    rows = np.concatenate(with_room[room])
    taken, rest = rows[:wanted], rows[wanted:]
    with_room[room] = [rest] if len(rest) else []
    room_counts[room] = len(rest)
    return taken


def _place(
    row: Ints,
    pieces: Ints,
    rows: Ints,
    fit: int,
    room: int,
    size: int,
    with_room: list[list[Ints]],
    room_counts: Ints,
) -> Ints:
    """Puts `fit` pieces into each row, fewer into the last when they run out; returns the pieces that are left."""
    placed = pieces[: fit * len(rows)]
    row[placed] = np.repeat(rows, fit)[: len(placed)]
    full = len(placed) // fit
    for some, taken in ((rows[:full], fit), (rows[full:], len(placed) - full * fit)):
        if len(some):
            with_room[room - taken * size].append(some)
            room_counts[room - taken * size] += len(some)
    return pieces[len(placed) :]
