"""Cells: buckets that fulfil the same targets. Their place in the tree decides how tightly targets hold in a batch.

C cells, S targets. With r the rounding at a node (at most half a row) and f the share of a target's rows among those
below a node, a target's error in any prefix is the sum over nodes of r * (f of the left child - f of the right one).
Inside a cell f does not change, so only the nodes above cells count; two prefixes bound any run of batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Signature = tuple[bool, ...]
Floats = npt.NDArray[np.float64]
# Joining is cubic in cells; above this many they are only split.
MOST_JOINED = 150
# Of two pairs that do not differ at all, the smaller is joined first.
_LITTLE = 1e-9


@dataclass(frozen=True)
class Pair:
    """A node above cells."""

    left: "Signature | Pair"
    right: "Signature | Pair"


def cells_of(members: Sequence[Sequence[bool]], num_buckets: int) -> dict[Signature, list[int]]:
    """Groups buckets by the targets that they fulfil.

    Args:
      members: for each target, whether each bucket is in it.
      num_buckets: how many there are.

    Returns:
      Signature -> bucket numbers, ascending; signatures in descending order.
    """
    cells: dict[Signature, list[int]] = {}
    for i in range(num_buckets):
        cells.setdefault(tuple(bool(member[i]) for member in members), []).append(i)
    return dict(sorted(cells.items(), reverse=True))


def arrange(totals: Mapping[Signature, int]) -> Signature | Pair:
    """Nests cells in pairs so that the bound of the worst target is low.

    Candidates join, again and again, the two nodes that differ least in their targets' shares, small ones first; how
    much smallness counts is tried out. Splitting by one target after the other is the last candidate.

    Args:
      totals: rows of each cell, positive.
    """
    candidates = [_split(list(totals), range(len(next(iter(totals)))))]
    if len(totals) <= MOST_JOINED:
        candidates += [_joined(totals, num_roots) for num_roots in (0, 1, 2)]
    return min(candidates, key=lambda candidate: float(np.max(error_bounds(totals, candidate), initial=0.0)))


def _joined(totals: Mapping[Signature, int], num_roots: int) -> Signature | Pair:
    """Joins nodes by the least (sum of differences) * rows ** (1 / 2 ** num_roots)."""
    nodes: list[Signature | Pair] = list(totals)
    rows = np.array(list(totals.values()), np.float64)
    inside = rows[:, None] * np.array(nodes, np.float64).reshape(len(nodes), -1)
    while len(nodes) > 1:
        shares = inside / rows[:, None]
        size = rows[:, None] + rows
        for _ in range(num_roots):
            size = np.sqrt(size)
        cost = (np.abs(shares[:, None] - shares).sum(axis=-1) + _LITTLE) * size
        cost[np.tril_indices(len(nodes))] = np.inf
        i, j = (int(n) for n in np.unravel_index(np.argmin(cost), cost.shape))
        keep = [n for n in range(len(nodes)) if n not in (i, j)]
        nodes = [*(nodes[n] for n in keep), Pair(nodes[i], nodes[j])]
        rows = np.append(rows[keep], rows[i] + rows[j])
        inside = np.vstack([inside[keep], inside[i] + inside[j]])
    return nodes[0]


def error_bounds(totals: Mapping[Signature, int], arrangement: Signature | Pair) -> Floats:
    """The most rows, for each target, by which any run of rows can differ from its share, float64 [S]."""
    return _walk(totals, arrangement)[2]


def _split(cells: Sequence[Signature], order: Sequence[int]) -> Signature | Pair:
    if len(cells) == 1:
        return cells[0]
    target, *rest = order
    inside = [cell for cell in cells if cell[target]]
    outside = [cell for cell in cells if not cell[target]]
    if not inside or not outside:
        return _split(cells, rest)
    return Pair(_split(inside, rest), _split(outside, rest))


def _walk(totals: Mapping[Signature, int], node: Signature | Pair) -> tuple[int, Floats, Floats]:
    """Rows below a node, each target's rows among them, and the bound so far."""
    if not isinstance(node, Pair):
        rows = totals[node]
        return rows, rows * np.array(node, np.float64), np.zeros(len(node))
    rows, inside, bound = _walk(totals, node.left)
    other_rows, other_inside, other_bound = _walk(totals, node.right)
    # Two prefixes, each off by half a row times the difference.
    here = np.abs(inside / rows - other_inside / other_rows)
    return rows + other_rows, inside + other_inside, bound + other_bound + here
