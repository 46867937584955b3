"""A balanced binary tree over quotas, descended by many row numbers at once in exact integers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# `split` is exact below this many rows: 10^15 rows of 2048 tokens are two million trillion tokens.
MAX_ROWS = 2**50


def split(k: Ints, left: Ints, total: Ints) -> tuple[Ints, Ints]:
    """Divides k * left by total, rounded to nearest, exactly, where the product does not fit 64 bits.

    The quotient in float64 is off by less than one: each of its two roundings is worth 2^-53 of a value below 2^50.
    The remainder then lies within +-4 total, so that computing it modulo 2^64 loses nothing, and corrects the quotient.

    Args:
      k, left, total: int64 [N], 0 <= k <= total, 0 <= left <= total, 0 < total < 2^50.

    Returns:
      (quotient, remainder) of 2 k left + total divided by 2 total, int64 [N] each.
    """
    quotient = np.rint(k.astype(np.float64) * left / total).astype(np.int64)
    twice = 2 * total
    remainder = 2 * k * left + total - twice * quotient  # wraps, and wraps back
    low, high = remainder < 0, remainder >= twice
    quotient += high.astype(np.int64) - low
    return quotient, remainder + twice * (low.astype(np.int64) - high)


@dataclass(frozen=True)
class Tree:
    """Node arrays, parents first. A leaf is its own left child with its whole quota, so descending stays in it.

    At a node with quota t whose left child has quota l, the first k rows hold exactly k l / t, rounded to nearest,
    rows of the left child.
    """

    quota: Ints
    left_quota: Ints
    left: Ints
    right: Ints
    leaf: Ints
    depth: int

    @classmethod
    def build(cls, items: Sequence[Any]) -> "Tree":
        """Nested sequences of quotas: a sequence is halved at its middle until it is one item, then its items are.

        Args:
          items: quotas, positive integers that add up to less than 2^50, nested in any way.

        Returns:
          The tree; leaves are numbered in the order of reading.
        """
        nodes: list[list[int]] = []  # quota, left quota, left, right, leaf
        depth = num_leaves = 0

        def grow(items: Sequence[Any], level: int) -> int:
            nonlocal depth, num_leaves
            if len(items) == 1 and not isinstance(items[0], int):
                return grow(items[0], level)
            node = len(nodes)
            nodes.append([])
            depth = max(depth, level)
            if len(items) == 1:
                nodes[node] = [items[0], items[0], node, node, num_leaves]
                num_leaves += 1
            else:
                middle = len(items) // 2
                left, right = grow(items[:middle], level + 1), grow(items[middle:], level + 1)
                nodes[node] = [nodes[left][0] + nodes[right][0], nodes[left][0], left, right, -1]
            return node

        grow(items, 0)
        assert nodes[0][0] < MAX_ROWS, "too many rows for exact arithmetic"
        quota, left_quota, left, right, leaf = np.array(nodes, np.int64).T
        return cls(quota, left_quota, left, right, leaf, depth)

    def descend(self, rows: Ints) -> tuple[Ints, Ints]:
        """Finds the leaf of each row and the row's number there.

        Args:
          rows: int64 [N], 0 <= row < the root's quota.

        Returns:
          (leaf, number among the leaf's rows), int64 [N] each.
        """
        node, k = np.zeros(rows.shape, np.int64), rows
        for _ in range(self.depth):
            total, left = self.quota[node], self.left_quota[node]
            before, remainder = split(k, left, total)
            goes_left = remainder + 2 * left >= 2 * total  # row k + 1 has one more on the left
            node = np.where(goes_left, self.left[node], self.right[node])
            k = np.where(goes_left, before, k - before)
        return self.leaf[node], k

    def count(self, row: int) -> Ints:
        """Rows of each leaf among the first `row`, int64 [leaves]."""
        prefix = [0] * len(self.quota)
        prefix[0] = row
        result = np.zeros((len(self.quota) + 1) // 2, np.int64)
        # Parents come before their children.
        arrays = (self.quota, self.left_quota, self.left, self.right, self.leaf)
        for node, (total, left_quota, left, right, leaf) in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
            if leaf >= 0:
                result[leaf] = prefix[node]
            else:
                prefix[left] = (2 * prefix[node] * left_quota + total) // (2 * total)
                prefix[right] = prefix[node] - prefix[left]
        return result

    def run_bounds(self, members: Any) -> npt.NDArray[np.float64]:
        """The most rows by which any run of rows can differ from its share, for each of several sets of leaves.

        Args:
          members: bool [sets, leaves].

        Returns:
          float64 [sets]: the sum over nodes of the difference between the set's shares on the left and on the right.
        """
        inside = np.zeros((len(self.quota), len(members)))
        bound = np.zeros(len(members))
        leaves = np.array(members, np.float64).reshape(len(members), (len(self.quota) + 1) // 2).T
        for node in reversed(range(len(self.quota))):  # children before their parents
            if self.leaf[node] >= 0:
                inside[node] = leaves[self.leaf[node]] * self.quota[node]
            else:
                left, right = self.left[node], self.right[node]
                inside[node] = inside[left] + inside[right]
                bound += np.abs(inside[left] / self.quota[left] - inside[right] / self.quota[right])
        return bound
