"""A run's rows, through changed plans and skipped batches, against a list of them."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlite_jax.config import MixtureConfig
from tlite_jax.data.mixture import BucketInfo, make_plan
from tlite_jax.data.order import Plan, PlannedBucket
from tlite_jax.data.segment_files import read_timeline, write_timeline
from tlite_jax.data.segments import Segment, Timeline, describe_change
from tlite_jax.errors import UserError


def plan_from(sizes: dict[str, tuple[int, int]], seed: int = 0) -> Plan:
    """A plan of buckets: name -> (rows, quota)."""
    buckets = tuple(PlannedBucket(name, {"l": name}, rows, quota, name) for name, (rows, quota) in sizes.items())
    return Plan((buckets,), seed, 64)


PLANS = (
    plan_from({"a": (7, 30), "b": (11, 20), "c": (3, 1)}),
    plan_from({"b": (11, 13), "d": (5, 40)}),
    plan_from({"a": (7, 90)}, seed=1),
)


@dataclass
class Listed:
    """The same as a timeline, row by row: what is still to come of each plan, and what was skipped."""

    rows: list[tuple[str, int]]
    gaps: list[tuple[int, str, int]]  # (row of the run before which it was skipped, plan, its row)


def start(plan: Plan) -> tuple[Timeline, Listed]:
    timeline = Timeline((Segment(0, plan.hash),), {plan.hash: plan})
    return timeline, Listed([(plan.hash, row) for row in range(plan.total_rows)], [])


operations = st.lists(
    st.one_of(
        st.tuples(st.just("then"), st.floats(0.05, 1), st.integers(1, 2)),
        st.tuples(st.just("without"), st.floats(0, 1), st.integers(1, 12)),
    ),
    max_size=5,
)


@given(operations, st.data())
@settings(max_examples=60, deadline=None)
def test_a_timeline_is_the_list_of_its_rows(changes: list, data: st.DataObject) -> None:
    timeline, listed = start(PLANS[0])
    used = {PLANS[0].hash}
    for kind, part, number in changes:
        row = int(part * len(listed.rows))
        if kind == "then" and PLANS[number].hash not in used:
            plan = PLANS[number]
            used.add(plan.hash)
            timeline = timeline.then(row, plan)
            listed.rows[row:] = [(plan.hash, i) for i in range(plan.total_rows)]
            listed.gaps = [gap for gap in listed.gaps if gap[0] <= row]
        elif kind == "without" and row + number <= len(listed.rows):
            timeline = timeline.without(row, row + number)
            moved = [(min(at, row) if at <= row + number else at - number, *rest) for at, *rest in listed.gaps]
            listed.gaps = moved + [(row, *gone) for gone in listed.rows[row : row + number]]
            del listed.rows[row : row + number]
    assert timeline.total_rows == len(listed.rows)
    plans = {plan.hash: plan for plan in PLANS}

    def names(rows: list[tuple[str, int]]) -> list[str]:
        return [plans[name].buckets[int(plans[name].locate(np.array([row]))[0][0])].name for name, row in rows]

    if listed.rows:
        bucket, epoch, row = timeline.locate(np.arange(len(listed.rows)))
        assert [timeline.buckets[i].name for i in bucket] == names(listed.rows)
        expected = [[int(x[0]) for x in plans[name].locate(np.array([place]))[1:]] for name, place in listed.rows]
        assert np.stack([epoch, row], axis=1).tolist() == expected
    at = data.draw(st.integers(0, len(listed.rows)))
    assert Counter(timeline.consumed(at)) == Counter(names(listed.rows[:at]))
    skipped = names([(name, row) for before, name, row in listed.gaps if before <= at])
    assert Counter(timeline.skipped(at)) == Counter(skipped)
    live = timeline.from_row(at)
    assert live.total_rows == timeline.total_rows
    if at < len(listed.rows):
        rest = np.arange(at, len(listed.rows))
        there, whole = live.locate(rest), timeline.locate(rest)
        assert [live.buckets[i] for i in there[0]] == [timeline.buckets[i] for i in whole[0]]
        assert np.array_equal(there[1:], whole[1:])
    assert timeline.agrees(timeline, at)


def test_a_changed_mixture_goes_on_where_each_bucket_was_left() -> None:
    infos = [BucketInfo("ru", {"l": "ru"}, 100, "x"), BucketInfo("en", {"l": "en"}, 50, "y")]

    def plan(share: float, timeline: Timeline | None = None, row: int = 0, seed: int = 0) -> Plan:
        far = timeline.reached(row, seed) if timeline else {}
        reached = {info.name: far.get((info.name, info.rows, info.content), 0) for info in infos}
        mixture = MixtureConfig(tokens=640, targets={"l=ru": share})
        return make_plan(mixture, infos, seed=seed, sequence_length=8, rows=None, reached=reached)

    first = plan(0.75)
    timeline = Timeline((Segment(0, first.hash),), {first.hash: first})
    timeline = timeline.without(8, 16)
    second = plan(0.5, timeline, 40)
    # 40 rows trained on and 8 skipped are 48 of the first plan: 36 Russian, 12 English.
    assert {bucket.name: bucket.start for bucket in second.buckets} == {"ru": 36, "en": 12}
    timeline = timeline.then(40, second)
    before, began = timeline.before_last_plan()
    assert before is not None
    assert plan(0.5, before, began).hash == second.hash
    bucket, epoch, row = timeline.locate(np.arange(timeline.total_rows))
    for number, planned in enumerate(timeline.buckets):
        places = list(zip(epoch[bucket == number].tolist(), row[bucket == number].tolist(), strict=True))
        assert len(set(places)) == len(places), f"{planned.name} repeats rows of an unfinished pass"
    assert {bucket.start for bucket in plan(0.5, timeline, 40, seed=1).buckets} == {0}
    infos[0] = BucketInfo("ru", {"l": "ru"}, 100, "other contents")
    assert {bucket.name: bucket.start for bucket in plan(0.5, timeline, 40).buckets} == {"ru": 0, "en": 12}


def test_a_change_is_described() -> None:
    a = plan_from({"a": (7, 30), "b": (11, 20), "c": (3, 1)})
    assert describe_change(a, plan_from({"a": (7, 31), "b": (12, 20)}, seed=4)) == (
        "seed: 0 -> 4; bucket a: 30 -> 31 rows; bucket b: other contents; and 1 more"
    )
    assert describe_change(a, Plan((a.buckets[:1], a.buckets[1:]), 0, 64)) == "the order of the buckets"


def test_rows_outside_are_refused() -> None:
    timeline, _ = start(PLANS[0])
    for rows in ([-1], [0, 51]):
        with pytest.raises(UserError, match="are not all in this run: it has 51 rows"):
            timeline.locate(np.array(rows))
    for first, stop in ((-1, 3), (3, 3), (40, 52)):
        with pytest.raises(UserError, match="it has 51 rows"):
            timeline.without(first, stop)


def test_files_keep_a_timeline(tmp_path) -> None:
    timeline = start(PLANS[0])[0].without(3, 9).then(20, PLANS[1])
    write_timeline(tmp_path, timeline)
    assert read_timeline(tmp_path, ()) == timeline
    (tmp_path / "segments.json").write_text("{}")
    with pytest.raises(UserError, match=r"segments\.json is damaged; delete it to go on"):
        read_timeline(tmp_path, timeline.segments)
    (tmp_path / "segments.json").unlink()
    assert read_timeline(tmp_path, timeline.segments) == timeline
    (tmp_path / "plans" / f"{PLANS[0].hash}.json").unlink()
    with pytest.raises(UserError, match="a plan that this run has used"):
        read_timeline(tmp_path, timeline.segments)
