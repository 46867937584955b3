"""Groups become exact quotas; what cannot be meant is refused."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tlite_jax.config import MixtureConfig, MixtureGroup
from tlite_jax.data.mixture import BucketInfo, Plan, make_plan
from tlite_jax.data.quantities import apportion, exact
from tlite_jax.data.usage import what_if
from tlite_jax.errors import UserError

BUCKETS = (
    BucketInfo("web.ru", {"language": "ru", "style": "web"}, 1000),
    BucketInfo("books.ru", {"language": "ru", "style": "books"}, 300),
    BucketInfo("web.en", {"language": "en", "style": "web"}, 70),
    BucketInfo("code", {"language": "code"}, 7),
)


def plan_of(*groups: MixtureGroup, rows: int | None = None, tokens: int | None = None, buckets=BUCKETS) -> Plan:
    mixture = MixtureConfig(tokens=tokens, groups=groups)
    return make_plan(mixture, buckets, seed=1, sequence_length=64, rows=rows)


def quotas(plan: Plan) -> dict[str, int]:
    return {bucket.name: bucket.quota for bucket in plan.buckets}


@given(
    shares=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
    sizes=st.lists(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), min_size=6, max_size=6),
    rows=st.integers(1, 10**7),
)
def test_shares_are_exact(shares: list[int], sizes: list[list[int]], rows: int) -> None:
    fractions = [share / sum(shares) for share in shares]
    groups = tuple(MixtureGroup(select={"g": str(g)}, share=share) for g, share in enumerate(fractions))
    buckets = [
        BucketInfo(f"{g}.{b}", {"g": str(g)}, size) for g in range(len(shares)) for b, size in enumerate(sizes[g])
    ]
    plan = plan_of(*groups, rows=rows, buckets=buckets)
    assert plan.total_rows == rows
    found = quotas(plan)
    for g, share in enumerate(fractions):
        in_group = [found.get(f"{g}.{b}", 0) for b in range(len(sizes[g]))]
        assert abs(sum(in_group) - rows * share) < 1 + rows * 1e-6
        for quota, size in zip(in_group, sizes[g], strict=True):
            assert abs(quota - sum(in_group) * size / sum(sizes[g])) < 2


@given(
    epochs=st.decimals(0, 5, places=3),
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=20),
)
def test_epochs_are_exact(epochs, sizes: list[int]) -> None:
    buckets = [BucketInfo(str(b), {}, size) for b, size in enumerate(sizes)]
    wanted = Fraction(str(epochs))
    total = math.floor(wanted * sum(sizes) + Fraction(1, 2))
    if not total:
        with pytest.raises(UserError, match="consumes nothing"):
            plan_of(MixtureGroup(select={}, epochs=float(epochs)), buckets=buckets)
        return
    plan = plan_of(MixtureGroup(select={}, epochs=float(epochs)), buckets=buckets)
    assert plan.total_rows == total
    found = quotas(plan)
    for b, size in enumerate(sizes):
        assert math.floor(wanted * size) <= found.get(str(b), 0) <= math.ceil(wanted * size)


@given(st.lists(st.fractions(0, 100), min_size=1, max_size=30))
def test_apportion_rounds_to_neighbours(amounts: list[Fraction]) -> None:
    for total in (math.floor(sum(amounts)), math.ceil(sum(amounts))):
        result = apportion(amounts, total)
        assert sum(result) == total
        assert all(math.floor(a) <= r <= math.ceil(a) for a, r in zip(amounts, result, strict=True))


def test_decimals_mean_what_they_say() -> None:
    assert exact(0.3) == Fraction(3, 10)
    plan = plan_of(MixtureGroup(select={}, epochs=0.3), buckets=[BucketInfo("b", {}, 10**15)])
    assert plan.total_rows == 3 * 10**14


def test_a_share_is_spread_by_rows_and_the_rest_is_selected_by_the_empty_group() -> None:
    russian = MixtureGroup(select={"language": "ru"}, share=0.85)
    plan = plan_of(russian, MixtureGroup(select={}, share=0.15), tokens=64 * 2600 + 63)
    assert quotas(plan) == {"web.ru": 1700, "books.ru": 510, "web.en": 355, "code": 35}
    usages = {usage.name: usage for usage in what_if(plan, BUCKETS)}
    assert usages["web.ru"].epochs == usages["books.ru"].epochs == 1.7
    assert usages["web.ru"].max_repeats == 2
    assert usages["web.ru"].group == 0
    assert usages["code"].group == 1
    assert sum(usage.consumed_tokens for usage in usages.values()) == 2600 * 64
    assert sum(usage.share for usage in usages.values()) == pytest.approx(1)


def test_target_shares_within_a_fifth_of_a_point() -> None:
    groups = [
        MixtureGroup(select={"language": name}, share=s) for name, s in (("ru", 0.85), ("en", 0.1), ("code", 0.05))
    ]
    for rows in (500, 12_345):
        plan = plan_of(*groups, rows=rows)
        for group, planned in zip(groups, plan.groups, strict=True):
            assert abs(sum(bucket.quota for bucket in planned) / rows - (group.share or 0)) <= 0.002


def test_shares_are_parts_of_their_sum() -> None:
    buckets = [BucketInfo(name, {"name": name}, 1000) for name in "abc"]
    groups = [MixtureGroup(select={"name": name}, share=0.3333334) for name in "abc"]
    assert list(quotas(plan_of(*groups, rows=30_000_000, buckets=buckets)).values()) == [10_000_000] * 3


def test_unused_buckets_are_said_and_zero_quotas_dropped() -> None:
    plan = plan_of(
        MixtureGroup(select={"language": "ru"}, epochs=0.5), MixtureGroup(select={"language": "en"}, epochs=0)
    )
    assert quotas(plan) == {"web.ru": 500, "books.ru": 150}
    unused = [usage for usage in what_if(plan, BUCKETS) if usage.group is None]
    assert [usage.name for usage in unused] == ["web.en", "code"]
    assert all(usage.consumed_rows == 0 for usage in unused)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"\{language: fr\} matches no bucket.*language: code, en, ru; style: books, web"
    ):
        plan_of(MixtureGroup(select={"language": "fr"}, epochs=1.0))
    both = MixtureGroup(select={"language": "ru"}, epochs=1.0), MixtureGroup(select={"style": "web"}, epochs=1.0)
    with pytest.raises(
        UserError, match=r"web\.ru is in two groups of the mixture, \{language: ru\} and \{style: web\}"
    ):
        plan_of(*both)
    with pytest.raises(UserError, match="two groups"):
        plan_of(MixtureGroup(select={}, epochs=1.0), MixtureGroup(select={}, epochs=1.0))
    with pytest.raises(UserError, match=r"need a budget: set data\.mixture\.tokens or train\.steps"):
        plan_of(MixtureGroup(select={}, share=1.0))
    with pytest.raises(UserError, match="less than a row"):
        plan_of(MixtureGroup(select={}, share=1.0), tokens=63)
    with pytest.raises(UserError, match="no rows to train on"):
        plan_of(MixtureGroup(select={}, epochs=1.0), buckets=[BucketInfo("b", {}, 0)])
    with pytest.raises(ValidationError, match="leave tokens out"):
        MixtureConfig(tokens=100, groups=(MixtureGroup(select={}, epochs=1.0),))
