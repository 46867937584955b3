"""The order of a stage's rows as pure index arithmetic: global row -> (bucket, epoch, row), and back to a ledger.

Buckets are the leaves of a balanced binary tree whose nodes carry the number of rows consumed below them (their
quota). At a node with quota t whose left child has quota l, the first k rows hold exactly
`left(k) = floor((2 k l + t) / (2 t))` rows of the left child: k l / t rounded to nearest. So every prefix of the order
has the mixture of the whole to within about half a row per level, and any row is found in O(log buckets).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.config import digest
from tlite_jax.data.permutation import mix64, permute
from tlite_jax.errors import UserError

Ints = npt.NDArray[np.int64]

PLAN_VERSION = 1
# Below this total, 2 k l + t fits int64; above it the descent uses Python's integers.
_INT64_SAFE_ROWS = 2**31


@dataclass(frozen=True)
class PlannedBucket:
    """A bucket of a plan: `quota` of its rows are consumed, `rows` of them are distinct."""

    name: str
    labels: dict[str, str]
    rows: int
    quota: int
    content: str

    @property
    def epochs(self) -> float:
        """Passes over the bucket."""
        return self.quota / self.rows


@dataclass(frozen=True)
class Segment:
    """From global row `start_row` on, rows come from the plan with this hash. A checkpoint keeps the list."""

    start_row: int
    plan_hash: str


@dataclass(frozen=True)
class Plan:
    """Which row is read when: a pure function of groups of buckets, quotas and a seed.

    Groups are the upper part of the tree, so that their shares hold most tightly.
    """

    groups: tuple[tuple[PlannedBucket, ...], ...]
    seed: int
    sequence_length: int

    def __post_init__(self) -> None:
        """Checks what `make_plan` promises."""
        assert self.groups, "nothing to consume"
        assert all(self.groups), "empty groups are dropped"
        assert all(bucket.quota > 0 and bucket.rows > 0 for bucket in self.buckets), "empty buckets are dropped"

    @cached_property
    def buckets(self) -> tuple[PlannedBucket, ...]:
        """The buckets that are consumed, in the order that `locate` numbers them."""
        return tuple(bucket for group in self.groups for bucket in group)

    @cached_property
    def quotas(self) -> Ints:
        """Rows consumed of each bucket, int64 [buckets]."""
        return np.array([bucket.quota for bucket in self.buckets], np.int64)

    @cached_property
    def total_rows(self) -> int:
        """Rows in the whole order."""
        return sum(bucket.quota for bucket in self.buckets)

    @cached_property
    def hash(self) -> str:
        """Names the order: equal hashes read equal rows in equal order. Labels do not matter to it."""
        groups = [[[b.name, b.rows, b.quota, b.content] for b in group] for group in self.groups]
        return digest([PLAN_VERSION, self.seed, self.sequence_length, groups])

    def locate(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Finds rows of the global order.

        Args:
          rows: int64 [N], global row numbers, 0..total_rows-1, in any order.

        Returns:
          (bucket index into `buckets`, epoch, row inside the bucket), int64 [N] each.

        Raises:
          UserError: a row lies outside the plan.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.total_rows):
            outside = rows[(rows < 0) | (rows >= self.total_rows)][0]
            raise UserError(f"row {outside} is outside the mixture: it has {self.total_rows} rows; enlarge its budget")
        node, k = np.zeros(rows.shape, np.int64), rows
        tree = self._tree
        if self.total_rows >= _INT64_SAFE_ROWS:
            tree, k = tree.wide(), k.astype(object)
        for _ in range(tree.depth):
            total, left = tree.quota[node], tree.left_quota[node]
            before = (2 * k * left + total) // (2 * total)
            after = (2 * (k + 1) * left + total) // (2 * total)
            goes_left = (after != before).astype(bool)
            node = np.where(goes_left, tree.left[node], tree.right[node])
            k = np.where(goes_left, before, k - before)
        bucket, k = tree.leaf[node], k.astype(np.int64)
        epoch, x = np.divmod(k, self._bucket_rows[bucket])
        key = mix64(self._bucket_keys[bucket] ^ mix64(epoch.astype(np.uint64)))
        return bucket, epoch, permute(x, self._bucket_rows[bucket], key)

    def consumed(self, row: int) -> Ints:
        """The ledger: rows of each bucket among the first `row` rows of the order, int64 [buckets], in closed form."""
        if not 0 <= row <= self.total_rows:
            raise UserError(f"row {row} is outside the mixture: it has {self.total_rows} rows")
        tree = self._tree
        prefix = [0] * len(tree.quota)
        prefix[0] = row
        result = np.zeros(len(self.buckets), np.int64)
        # Parents come before their children.
        nodes = zip(*(a.tolist() for a in (tree.quota, tree.left_quota, tree.left, tree.right, tree.leaf)), strict=True)
        for node, (total, left_quota, left, right, leaf) in enumerate(nodes):
            if leaf >= 0:
                result[leaf] = prefix[node]
            else:
                prefix[left] = (2 * prefix[node] * left_quota + total) // (2 * total)
                prefix[right] = prefix[node] - prefix[left]
        return result

    def to_json(self) -> str:
        """Serialises the plan, its hash included."""
        groups = [[vars(bucket) for bucket in group] for group in self.groups]
        values = {"version": PLAN_VERSION, "hash": self.hash, "seed": self.seed, "groups": groups}
        return json.dumps({**values, "sequence_length": self.sequence_length}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
          UserError: another version, or contents that do not match their hash.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] != PLAN_VERSION:
                raise UserError(f"plan of version {values['version']}; this program reads version {PLAN_VERSION}")
            groups = tuple(tuple(PlannedBucket(**bucket) for bucket in group) for group in values["groups"])
            plan = cls(groups, values["seed"], values["sequence_length"])
            intact = plan.hash == values["hash"]
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise error if isinstance(error, UserError) else UserError(f"damaged plan: {error!r}") from error
        if not intact:
            raise UserError(f"damaged plan: its contents do not match its hash {values['hash']}")
        return plan

    @cached_property
    def _tree(self) -> "_Tree":
        return _Tree.build([[bucket.quota for bucket in group] for group in self.groups])

    @cached_property
    def _bucket_rows(self) -> Ints:
        return np.array([bucket.rows for bucket in self.buckets], np.int64)

    @cached_property
    def _bucket_keys(self) -> npt.NDArray[np.uint64]:
        """A bucket's shuffles depend on the seed and its name, not on its place among others."""
        hashes = [hashlib.sha256(f"{self.seed}/{bucket.name}".encode()).digest()[:8] for bucket in self.buckets]
        return np.array([int.from_bytes(value, "little") for value in hashes], np.uint64)


@dataclass(frozen=True)
class _Tree:
    """Node arrays, parents first. A leaf is its own left child with its whole quota, so descending stays in it."""

    quota: npt.NDArray[Any]
    left_quota: npt.NDArray[Any]
    left: Ints
    right: Ints
    leaf: Ints
    depth: int

    def wide(self) -> "_Tree":
        """The same tree with quotas as Python integers."""
        return _Tree(
            self.quota.astype(object), self.left_quota.astype(object), self.left, self.right, self.leaf, self.depth
        )

    @classmethod
    def build(cls, groups: Sequence[Sequence[int]]) -> "_Tree":
        """Balanced over groups, then over each group's buckets."""
        nodes: list[list[int]] = []  # quota, left quota, left, right, leaf
        numbers = iter(range(sum(len(group) for group in groups)))
        depth = 0

        def grow(items: Sequence[Any], level: int) -> int:
            nonlocal depth
            if len(items) == 1 and not isinstance(items[0], int):
                return grow(items[0], level)
            node = len(nodes)
            nodes.append([])
            depth = max(depth, level)
            if len(items) == 1:
                nodes[node] = [items[0], items[0], node, node, next(numbers)]
            else:
                middle = len(items) // 2
                left, right = grow(items[:middle], level + 1), grow(items[middle:], level + 1)
                nodes[node] = [nodes[left][0] + nodes[right][0], nodes[left][0], left, right, -1]
            return node

        grow(groups, 0)
        quota, left_quota, left, right, leaf = np.array(nodes, np.int64).T
        return cls(quota, left_quota, left, right, leaf, depth)
