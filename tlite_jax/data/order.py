"""The order of rows as arithmetic: global row -> (bucket, epoch, row), and back to a ledger.

Buckets are the leaves of a balanced binary tree whose nodes carry the number of rows consumed below them (their
quota). At a node with quota t whose left child has quota l, the first k rows hold exactly
`left(k) = floor((2 k l + t) / (2 t))` rows of the left child: k l / t rounded to nearest. So every prefix of the order
has the mixture of the whole to within about half a row per level, and any row is found in O(log buckets).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tlite_jax.config import digest
from tlite_jax.data.permutation import mix64, permute
from tlite_jax.data.tree import MAX_ROWS, Tree
from tlite_jax.errors import UserError

Ints = npt.NDArray[np.int64]

PLAN_VERSION = 2
# Version 1 had groups of buckets only, and no bucket that goes on where an earlier plan left it.
READABLE_VERSIONS = (1, 2)
# What a hash says besides a plan's contents: how they become an order.
_ORDER_VERSION = 1


@dataclass(frozen=True)
class PlannedBucket:
    """A bucket of a plan: `quota` of its rows are consumed, `rows` of them are distinct.

    `start` rows of its endless sequence of passes were read before this plan, which goes on after them.
    """

    name: str
    labels: dict[str, str]
    rows: int
    quota: int
    content: str
    start: int = 0

    @property
    def epochs(self) -> float:
        """Passes over the bucket."""
        return self.quota / self.rows


Nested: TypeAlias = "PlannedBucket | tuple[Nested, ...]"


@dataclass(frozen=True)
class Plan:
    """Which row is read when: a pure function of nested groups of buckets, quotas and a seed.

    Groups are the upper part of the tree, so that their shares hold most tightly; groups may hold groups.
    """

    groups: tuple[Nested, ...]
    seed: int
    sequence_length: int

    def __post_init__(self) -> None:
        """Checks what `make_plan` promises."""
        assert self.groups, "nothing to consume"
        assert all(group != () for group in self.groups), "empty groups are dropped"
        assert all(b.quota > 0 and b.rows > 0 and b.start >= 0 for b in self.buckets), "empty buckets are dropped"
        if self.total_rows >= MAX_ROWS:
            raise UserError(f"the mixture has {self.total_rows} rows, more than {MAX_ROWS - 1}; lower its budget")

    @cached_property
    def buckets(self) -> tuple[PlannedBucket, ...]:
        """The buckets that are consumed, in the order that `locate` numbers them."""
        return tuple(_leaves(self.groups))

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

        def contents(b: PlannedBucket) -> list[Any]:
            return [b.name, b.rows, b.quota, b.content, *([b.start] if b.start else [])]

        return digest([_ORDER_VERSION, self.seed, self.sequence_length, _mapped(self.groups, contents)])

    def locate(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Finds rows of the global order.

        Args:
          rows: int64 [N], global row numbers, 0..total_rows-1, in any order.

        Returns:
          (bucket index into `buckets`, epoch, row inside the bucket), int64 [N] each.

        Raises:
          UserError: a row lies outside the plan.
        """
        bucket, k = self._descend(rows)
        epoch, x = np.divmod(k + self._bucket_starts[bucket], self._bucket_rows[bucket])
        key = mix64(self._bucket_keys[bucket] ^ mix64(epoch.astype(np.uint64)))
        return bucket, epoch, permute(x, self._bucket_rows[bucket], key)

    def bucket_numbers(self, rows: Ints) -> Ints:
        """The first of what `locate` finds, several times faster."""
        return self._descend(rows)[0]

    def consumed(self, row: int) -> Ints:
        """The ledger: rows of each bucket among the first `row` rows of the order, int64 [buckets], in closed form."""
        if not 0 <= row <= self.total_rows:
            raise UserError(f"row {row} is outside the mixture: it has {self.total_rows} rows")
        return self._tree.count(row)

    def run_bounds(self, members: Sequence[Sequence[bool]]) -> npt.NDArray[np.float64]:
        """The most rows by which any run of rows can differ from its share of a set of buckets.

        Args:
          members: for each set, whether each of `buckets` is in it.

        Returns:
          float64 [sets].
        """
        return self._tree.run_bounds(members)

    def to_json(self) -> str:
        """Serialises the plan, its hash included."""
        values = {"version": PLAN_VERSION, "hash": self.hash, "seed": self.seed, "groups": _mapped(self.groups, vars)}
        return json.dumps({**values, "sequence_length": self.sequence_length}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
          UserError: another version, or contents that do not match their hash.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] not in READABLE_VERSIONS:
                raise UserError(f"plan of version {values['version']}; this program reads version {PLAN_VERSION}")
            plan = cls(_parsed(values["groups"]), values["seed"], values["sequence_length"])
            intact = plan.hash == values["hash"]
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise error if isinstance(error, UserError) else UserError(f"damaged plan: {error!r}") from error
        if not intact:
            raise UserError(f"damaged plan: its contents do not match its hash {values['hash']}")
        return plan

    def _descend(self, rows: Ints) -> tuple[Ints, Ints]:
        """The bucket of each row and the row's number among its rows."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.total_rows):
            outside = rows[(rows < 0) | (rows >= self.total_rows)][0]
            raise UserError(f"row {outside} is outside the mixture: it has {self.total_rows} rows; enlarge its budget")
        return self._tree.descend(rows)

    @cached_property
    def _tree(self) -> Tree:
        return Tree.build(_mapped(self.groups, lambda bucket: bucket.quota))

    @cached_property
    def _bucket_rows(self) -> Ints:
        return np.array([bucket.rows for bucket in self.buckets], np.int64)

    @cached_property
    def _bucket_starts(self) -> Ints:
        return np.array([bucket.start for bucket in self.buckets], np.int64)

    @cached_property
    def _bucket_keys(self) -> npt.NDArray[np.uint64]:
        """A bucket's shuffles depend on the seed and its name, not on its place among others."""
        hashes = [hashlib.sha256(f"{self.seed}/{bucket.name}".encode()).digest()[:8] for bucket in self.buckets]
        return np.array([int.from_bytes(value, "little") for value in hashes], np.uint64)


def _leaves(groups: Sequence[Nested]) -> Iterator[PlannedBucket]:
    for item in groups:
        if isinstance(item, tuple):
            yield from _leaves(item)
        else:
            yield item


def _mapped(groups: Sequence[Nested], function: Any) -> list[Any]:
    """Nested lists of what a function makes of each bucket."""
    return [_mapped(item, function) if isinstance(item, tuple) else function(item) for item in groups]


def _parsed(groups: list[Any]) -> tuple[Nested, ...]:
    return tuple(PlannedBucket(**item) if isinstance(item, dict) else _parsed(item) for item in groups)
