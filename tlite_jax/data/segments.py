"""What a run reads, from its first row to its last: parts of plans, one after another.

A run's rows are numbered as it trains on them. A segment says from which of them on which plan is read, beginning at
which of the plan's rows. Rows of a plan between the end of one segment and the beginning of the next are skipped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tlite_jax.data.order import Ints, Plan, PlannedBucket
from tlite_jax.errors import UserError


@dataclass(frozen=True)
class Segment:
    """From the run's row `start_row` on, rows come from the plan with this hash, beginning at its row `plan_row`."""

    start_row: int
    plan_hash: str
    plan_row: int = 0


@dataclass(frozen=True)
class Timeline:
    """The segments of a run with their plans. It reads like a plan: `locate`, `buckets`, `total_rows`.

    Attributes:
      segments: by ascending start_row; the first starts at 0.
      plans: hash -> plan, for every segment.
    """

    segments: tuple[Segment, ...]
    plans: Mapping[str, Plan]

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return self.last_plan.sequence_length

    @property
    def last_plan(self) -> Plan:
        """The plan of the last segment."""
        return self._plan(self.segments[-1])

    @cached_property
    def total_rows(self) -> int:
        """Rows of the run from its first to the end of its last plan."""
        last = self.segments[-1]
        return last.start_row + self._plan(last).total_rows - last.plan_row

    @cached_property
    def buckets(self) -> tuple[PlannedBucket, ...]:
        """Each bucket of any segment once, in the order that `locate` numbers them."""
        found = {_identity(bucket): bucket for plan in self._plans_in_order for bucket in plan.buckets}
        return tuple(found.values())

    def locate(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Finds rows of the run.

        Args:
          rows: int64 [N], in any order.

        Returns:
          (bucket index into `buckets`, epoch, row inside the bucket), int64 [N] each.

        Raises:
          UserError: a row lies before the first segment or past the last one's plan.
        """
        result = np.zeros((3, len(rows)), np.int64)
        for here, plan, plan_rows in self._by_segment(rows):
            bucket, epoch, row = plan.locate(plan_rows)
            result[:, here] = self._index[plan.hash][bucket], epoch, row
        return result[0], result[1], result[2]

    def bucket_numbers(self, rows: Ints) -> Ints:
        """The first of what `locate` finds, several times faster."""
        result = np.zeros(len(rows), np.int64)
        for here, plan, plan_rows in self._by_segment(rows):
            result[here] = self._index[plan.hash][plan.bucket_numbers(plan_rows)]
        return result

    def consumed(self, row: int) -> dict[str, int]:
        """The ledger: bucket name -> rows trained on among the run's first `row` rows; in closed form."""
        return self._sum(self._trained(row))

    def skipped(self, row: int) -> dict[str, int]:
        """Bucket name -> rows passed over before the run's row `row`; none where nothing was skipped."""
        gaps = []
        place: tuple[str, int] | None = None
        for segment, (plan, start, stop) in zip(self.segments, self._trained(row), strict=False):
            come_from = place[1] if place and place[0] == segment.plan_hash else 0
            gaps.append((plan, come_from, start))
            place = segment.plan_hash, stop
        return {name: count for name, count in self._sum(gaps).items() if count}

    @property
    def skipped_rows(self) -> int:
        """Rows skipped in all."""
        return sum(self.skipped(self.total_rows).values())

    def reached(self, row: int, seed: int) -> dict[tuple[str, int, str], int]:
        """How far each bucket's passes have come when the run has read `row` rows, skipped ones counted as read.

        Args:
          row: of the run.
          seed: of the plan that is to go on; passes of another seed are other passes and do not count.

        Returns:
          (name, rows, content) -> rows of its passes.
        """
        result: dict[tuple[str, int, str], int] = {}
        for plan, _, stop in self._trained(row):
            if plan.seed == seed:
                for bucket, count in zip(plan.buckets, plan.consumed(stop).tolist(), strict=True):
                    key = _identity(bucket)
                    result[key] = max(result.get(key, 0), bucket.start + count)
        return result

    def agrees(self, other: "Timeline", row: int) -> bool:
        """Whether both read the same in the run's first `row` rows."""
        return self._trained_hashes(row) == other._trained_hashes(row)

    def from_row(self, row: int) -> "Timeline":
        """The same run without the segments that are over before `row`."""
        first = int(np.searchsorted(self._starts, row, side="right")) - 1
        return replace(self, segments=self.segments[max(first, 0) :])

    def before_last_plan(self) -> tuple["Timeline | None", int]:
        """What was read before the last plan began, None where there is nothing, and the row at which it began."""
        first = [segment.plan_hash for segment in self.segments].index(self.segments[-1].plan_hash)
        began = self.segments[first].start_row
        return (replace(self, segments=self.segments[:first]) if first else None), began

    def then(self, row: int, plan: Plan) -> "Timeline":
        """The run that goes over to a plan's first row at `row`; segments declared for later are dropped."""
        kept = (s for s in self.segments if s.start_row < row or (s.start_row == row and s.plan_row))
        return Timeline((*kept, Segment(row, plan.hash)), {**self.plans, plan.hash: plan})

    def without(self, start: int, stop: int) -> "Timeline":
        """The run without its rows from `start` to before `stop`; what came after them follows at `start`.

        Raises:
          UserError: there are no such rows.
        """
        if not 0 <= start < stop <= self.total_rows:
            raise UserError(f"rows {start} to {stop} are not all in this run: it has {self.total_rows} rows")
        result = [segment for segment in self.segments if segment.start_row < start]
        for segment, (_, first, end) in zip(self.segments, self._trained(stop), strict=False):
            if segment.start_row >= start or segment.start_row + end - first > start:
                result.append(Segment(start, segment.plan_hash, end))
        after = [replace(s, start_row=s.start_row - (stop - start)) for s in self.segments if s.start_row > stop]
        return replace(self, segments=(*result, *after))

    def _by_segment(self, rows: Ints) -> Iterator[tuple[npt.NDArray[np.bool_], Plan, Ints]]:
        """Of each segment that has some of the rows: which, its plan, and their numbers there."""
        rows = np.asarray(rows, np.int64)
        number = np.searchsorted(self._starts, rows, side="right") - 1
        if rows.size and (number.min() < 0 or rows.max() >= self.total_rows):
            raise UserError(f"rows {rows.min()} to {rows.max()} are not all in this run: it has {self.total_rows} rows")
        for i in np.unique(number):
            here, segment = number == i, self.segments[i]
            yield here, self._plan(segment), rows[here] - segment.start_row + segment.plan_row

    def _trained(self, row: int) -> list[tuple[Plan, int, int]]:
        """(plan, first row, row after the last) of each segment that begins by `row`, cut there."""
        ends = [segment.start_row for segment in self.segments[1:]] + [row]
        return [
            (self._plan(segment), segment.plan_row, segment.plan_row + min(end, row) - segment.start_row)
            for segment, end in zip(self.segments, ends, strict=True)
            if segment.start_row <= row
        ]

    def _trained_hashes(self, row: int) -> list[tuple[str, int, int]]:
        return [(plan.hash, start, stop) for plan, start, stop in self._trained(row) if start < stop]

    def _sum(self, parts: Sequence[tuple[Plan, int, int]]) -> dict[str, int]:
        result: dict[str, int] = {}
        for plan, start, stop in parts:
            rows = plan.consumed(stop) - plan.consumed(start)
            for bucket, count in zip(plan.buckets, rows.tolist(), strict=True):
                result[bucket.name] = result.get(bucket.name, 0) + count
        return result

    def _plan(self, segment: Segment) -> Plan:
        return self.plans[segment.plan_hash]

    @cached_property
    def _plans_in_order(self) -> list[Plan]:
        return [self.plans[name] for name in dict.fromkeys(segment.plan_hash for segment in self.segments)]

    @cached_property
    def _starts(self) -> Ints:
        return np.array([segment.start_row for segment in self.segments], np.int64)

    @cached_property
    def _index(self) -> dict[str, Ints]:
        """For each plan, where its buckets are among `buckets`."""
        places = {_identity(bucket): i for i, bucket in enumerate(self.buckets)}
        return {p.hash: np.array([places[_identity(b)] for b in p.buckets], np.int64) for p in self._plans_in_order}


Order = Plan | Timeline


def _identity(bucket: PlannedBucket) -> tuple[str, int, str]:
    return bucket.name, bucket.rows, bucket.content


def describe_change(old: Plan, new: Plan, most: int = 3) -> str:
    """Says in a line what makes one plan another; long lists are cut short."""
    before, after = ({bucket.name: bucket for bucket in plan.buckets} for plan in (old, new))
    found = []
    if old.seed != new.seed:
        found.append(f"seed: {old.seed} -> {new.seed}")
    if old.sequence_length != new.sequence_length:
        found.append(f"sequence_length: {old.sequence_length} -> {new.sequence_length}")
    for name in sorted({*before, *after}):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            found.append(f"bucket {name}: {'no longer read' if b is None else 'new'}")
        elif (a.rows, a.content) != (b.rows, b.content):
            found.append(f"bucket {name}: other contents")
        elif (a.quota, a.start) != (b.quota, b.start):
            found.append(f"bucket {name}: {a.quota} -> {b.quota} rows")
    shown = "; ".join(found[:most]) or "the order of the buckets"
    return shown + (f"; and {len(found) - most} more" if len(found) > most else "")
