"""The order of rows: exact quotas, exact epochs, an even mixture, a closed-form ledger."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlite_jax.data.order import Plan, PlannedBucket
from tlite_jax.errors import UserError


def plan_from(groups: list[list[tuple[int, int]]], seed: int = 0) -> Plan:
    """A plan of groups of (rows, quota)."""
    made = [
        tuple(PlannedBucket(f"{g}.{b}", {"g": str(g)}, rows, quota, "") for b, (rows, quota) in enumerate(group))
        for g, group in enumerate(groups)
    ]
    return Plan(tuple(made), seed, 64)


a_bucket = st.tuples(st.integers(1, 120), st.integers(1, 300))
plans = st.builds(
    plan_from,
    st.lists(st.lists(a_bucket, min_size=1, max_size=7), min_size=1, max_size=5),
    st.integers(0, 2**32),
)


@given(plans)
@settings(max_examples=60)
def test_every_row_is_seen_floor_or_ceil_of_its_epochs_times(plan: Plan) -> None:
    bucket, epoch, row = plan.locate(np.arange(plan.total_rows))
    assert np.bincount(bucket, minlength=len(plan.buckets)).tolist() == plan.quotas.tolist()
    for number, planned in enumerate(plan.buckets):
        mine = bucket == number
        times = np.bincount(row[mine], minlength=planned.rows)
        assert len(times) == planned.rows
        assert set(times) <= {planned.quota // planned.rows, -(-planned.quota // planned.rows)}
        # Epochs follow one another, and in each of them no row comes twice.
        assert np.all(np.diff(epoch[mine]) >= 0)
        assert len(set(zip(epoch[mine], row[mine], strict=True))) == mine.sum()


@given(plans, st.floats(0, 1))
@settings(max_examples=60)
def test_the_ledger_equals_a_replay(plan: Plan, part: float) -> None:
    until = round(part * plan.total_rows)
    bucket, _, _ = plan.locate(np.arange(until))
    assert plan.consumed(until).tolist() == np.bincount(bucket, minlength=len(plan.buckets)).tolist()


@given(plans, st.floats(0, 1))
@settings(max_examples=60)
def test_every_prefix_has_the_mixture_of_the_whole(plan: Plan, part: float) -> None:
    until = round(part * plan.total_rows)
    target = plan.quotas * until / plan.total_rows
    levels = 1 + np.ceil(np.log2(len(plan.buckets) + 1)) + np.ceil(np.log2(len(plan.groups) + 1))
    assert np.abs(plan.consumed(until) - target).max() <= 0.5 * levels


@given(plans, st.data())
@settings(max_examples=40)
def test_rows_are_found_in_any_order_and_company(plan: Plan, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, plan.total_rows - 1), min_size=1, max_size=20))
    together = np.stack(plan.locate(np.array(rows)))
    whole = np.stack(plan.locate(np.arange(plan.total_rows)))
    assert np.array_equal(together, whole[:, rows])


def test_an_epoch_is_shuffled_anew_and_a_smaller_fraction_is_a_prefix() -> None:
    _, epoch, row = plan_from([[(1000, 3000)]]).locate(np.arange(3000))
    first, second = row[epoch == 0], row[epoch == 1]
    assert np.mean(first == second) < 0.02
    fewer = plan_from([[(1000, 300)]])
    assert np.array_equal(fewer.locate(np.arange(300))[2], first[:300])


def test_a_bucket_keeps_its_shuffle_beside_others() -> None:
    alone, beside = plan_from([[(500, 500)]]), plan_from([[(500, 500), (90, 90)], [(40, 80)]])
    bucket, _, row = beside.locate(np.arange(beside.total_rows))
    assert np.array_equal(row[bucket == 0], alone.locate(np.arange(500))[2])


def test_2000_buckets_of_very_different_sizes_give_every_batch_the_mixture() -> None:
    rng = np.random.default_rng(0)
    sizes = np.maximum(1, rng.lognormal(6, 3, 2000)).astype(int)
    quotas = np.maximum(1, sizes * 0.4).astype(int)
    groups = [[(int(s), int(q)) for s, q in zip(sizes[g::3], quotas[g::3], strict=True)] for g in range(3)]
    plan = plan_from(groups)
    group_of = np.repeat(np.arange(3), [len(group) for group in groups])
    target = np.array([sum(q for _, q in group) for group in groups]) / plan.total_rows
    for start in (0, 768 * 7, plan.total_rows // 2, plan.total_rows - 768):
        bucket, _, _ = plan.locate(np.arange(start, start + 768))
        got = np.bincount(group_of[bucket], minlength=3) / 768
        assert np.abs(got - target).max() <= 0.002


def test_a_prefix_of_2000_buckets_is_off_by_rows_not_by_hundreds() -> None:
    rng = np.random.default_rng(1)
    quotas = np.maximum(1, rng.lognormal(4, 3, 2000)).astype(int)
    plan = plan_from([[(int(q), int(q)) for q in quotas]])
    for until in rng.integers(0, plan.total_rows, 20):
        error = plan.consumed(int(until)) - plan.quotas * (until / plan.total_rows)
        assert np.abs(error).max() <= 0.5 * 11
        # Any run of buckets together, a language say, is off by little too.
        assert np.abs(np.cumsum(error)).max() <= 0.5 * 11


def test_300_billion_tokens_and_beyond_are_exact() -> None:
    for total in (36_621_094, 2**31 + 12_345, 2**41):
        quotas = [total * 3 // 5, total // 5 + 12_345]
        quotas.append(total - sum(quotas))
        plan = plan_from([[(7, quotas[0]), (7, quotas[1])], [(7, quotas[2])]])
        for start in (0, total // 3, total - 768):
            bucket, epoch, _ = plan.locate(np.arange(start, start + 768))
            ledger = plan.consumed(start + 768) - plan.consumed(start)
            assert np.bincount(bucket, minlength=3).tolist() == ledger.tolist()
            assert ledger == pytest.approx([460.8, 153.6, 153.6], abs=2)
            # The ledger before a row says which of its bucket's rows it is: the descent agrees, in exact integers.
            for i in range(0, 768, 97):
                assert epoch[i] == plan.consumed(start + i)[bucket[i]] // 7
        assert plan.consumed(total).tolist() == quotas


def test_past_the_end_is_refused() -> None:
    plan = plan_from([[(10, 20)]])
    with pytest.raises(UserError, match="row 20 is outside the mixture: it has 20 rows"):
        plan.locate(np.array([3, 20]))
    with pytest.raises(UserError, match="outside"):
        plan.consumed(21)


@given(plans)
@settings(max_examples=20)
def test_a_plan_survives_json(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash


def test_a_changed_plan_has_another_hash_and_a_damaged_one_is_refused() -> None:
    plan = plan_from([[(10, 20)], [(5, 5)]])
    others = [plan_from([[(10, 20), (5, 5)]]), plan_from([[(10, 21)], [(5, 5)]]), plan_from([[(10, 20)], [(5, 5)]], 1)]
    assert len({plan.hash, *(other.hash for other in others)}) == 4
    values = json.loads(plan.to_json())
    values["groups"][0][0]["quota"] = 19
    with pytest.raises(UserError, match="damaged plan"):
        Plan.from_json(json.dumps(values))
    for text in ("{", "[]", "{}", json.dumps({**values, "version": 99})):
        with pytest.raises(UserError):
            Plan.from_json(text)
