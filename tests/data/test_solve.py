"""The language of mixtures: rates, balances, limits and targets become the rows that can be worked out by hand."""

from collections.abc import Mapping

import numpy as np
import pytest
from pydantic import ValidationError

from tlite_jax.config import MixtureConfig
from tlite_jax.config.pattern import matches, parse_pattern
from tlite_jax.data.mixture import BucketInfo, Plan, make_plan
from tlite_jax.data.usage import target_usages
from tlite_jax.errors import UserError

BUCKETS = (
    BucketInfo("cc.news", {"source": "cc", "style": "news", "language": "ru"}, 4000),
    BucketInfo("cc.blog", {"source": "cc", "style": "blog", "language": "ru"}, 4000),
    BucketInfo("books.law", {"source": "books", "domain": "law", "language": "ru"}, 900),
    BucketInfo("books.poetry", {"source": "books", "domain": "poetry", "language": "ru"}, 100),
    BucketInfo("web.en", {"source": "web", "language": "en"}, 5000),
    BucketInfo("code", {"source": "code", "language": "code"}, 1000),
)


def plan_of(buckets=BUCKETS, *, rows: int | None = None, reached: Mapping[str, int] | None = None, **mixture) -> Plan:
    config = MixtureConfig.model_validate(mixture)
    return make_plan(config, buckets, seed=1, sequence_length=10, rows=rows, reached=reached)


def quotas(plan: Plan) -> dict[str, int]:
    return {bucket.name: bucket.quota for bucket in plan.buckets}


def test_epochs_of_the_whole_are_a_part_of_every_bucket() -> None:
    assert quotas(plan_of(epochs=0.3)) == {bucket.name: bucket.rows * 3 // 10 for bucket in BUCKETS}
    assert quotas(plan_of()) == {bucket.name: bucket.rows for bucket in BUCKETS}
    assert plan_of(epochs=3.0).total_rows == 45_000


def test_rates_multiply_and_a_budget_scales_them() -> None:
    rates = {"source=cc": 0.5, "style=news": 0.1, "source=books": 3.0, "language=code": 0.0}
    whole = quotas(plan_of(rates=rates))
    assert whole == {"cc.news": 200, "cc.blog": 2000, "books.law": 2700, "books.poetry": 300, "web.en": 5000}
    assert quotas(plan_of(rates=rates, tokens=51_000)) == {name: rows // 2 for name, rows in whole.items()}
    assert quotas(plan_of(rates=rates, epochs=2.0)) == {name: rows * 2 for name, rows in whole.items()}


def test_a_lower_rate_reads_a_part_of_what_a_higher_one_reads() -> None:
    def read(rate: float) -> set[int]:
        plan = plan_of(rates={"style=news": rate})
        bucket, _, row = plan.locate(np.arange(plan.total_rows))
        return set(row[bucket == [b.name for b in plan.buckets].index("cc.news")].tolist())

    a_twentieth, a_fifth, all_of_it = read(0.05), read(0.2), read(1.5)
    assert a_twentieth < a_fifth < all_of_it
    assert [len(rows) for rows in (a_twentieth, a_fifth, all_of_it)] == [200, 800, 4000]


def test_balance_evens_out_a_label_and_keeps_the_sum() -> None:
    # 900 and 100: alpha 0 gives 500 each, alpha 1/2 gives 3 : 1, at most twice the 100 leaves 800 : 200.
    for balance, law, poetry in (
        ({"by": "domain", "alpha": 0.0}, 500, 500),
        ({"by": "domain", "alpha": 0.5}, 750, 250),
        ({"by": "domain", "alpha": 1.0}, 900, 100),
        ({"by": "domain", "alpha": 0.0, "max_rate": 2.0}, 800, 200),
    ):
        found = quotas(plan_of(balance={"source=books": balance}))
        assert (found["books.law"], found["books.poetry"], found["cc.news"]) == (law, poetry, 4000)
    with pytest.raises(UserError, match=r"balanced by domain, a label that bucket cc\.news does not have"):
        plan_of(balance={"all": {"by": "domain", "alpha": 0.0}})


def test_one_target_scales_its_buckets_and_the_others() -> None:
    found = quotas(plan_of(tokens=100_000, targets={"language=ru": 0.85}, rates={"style=news": 0.25}))
    # 8500 rows over the weights 1000 : 4000 : 900 : 100, 1500 over 5000 : 1000.
    expected = (1416.67, 5666.67, 1275, 141.67, 1250, 250)
    assert list(found.values()) == pytest.approx(expected, abs=1)
    assert sum(list(found.values())[:4]) == 8500


def test_what_a_limit_takes_goes_to_the_rest_of_the_cell() -> None:
    limited = {"max_epochs": {"source=books": 1.5, "bucket=books.law": 0.5}, "targets": {"language=ru": 0.9}}
    found = quotas(plan_of(tokens=200_000, **limited))
    assert (found["books.law"], found["books.poetry"]) == (450, 150)
    assert found["cc.news"] == found["cc.blog"] == (18_000 - 600) / 2
    assert found["web.en"] + found["code"] == 2000


def test_crossing_targets_hold_and_stay_nearest_to_the_weights() -> None:
    targets = {"language=ru": 0.6, "source=books|code": 0.3}
    found = quotas(plan_of(tokens=100_000, targets=targets))
    assert sum(found[name] for name in ("cc.news", "cc.blog", "books.law", "books.poetry")) == 6000
    assert sum(found[name] for name in ("code", "books.law", "books.poetry")) == 3000
    # Nearest in the sense of Kullback and Leibler: odds ratios of the cells are those of the weights.
    books, other_ru = found["books.law"] + found["books.poetry"], found["cc.news"] + found["cc.blog"]
    assert books / other_ru / (found["code"] / found["web.en"]) == pytest.approx(1000 / 8000 / (1000 / 5000), rel=5e-3)
    assert found["books.law"] == pytest.approx(9 * found["books.poetry"], abs=5)


def crossing_labels(seed: int) -> list[BucketInfo]:
    """2,000 buckets of log-normal sizes with three labels each."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, rng.lognormal(8, 3, 2000)).astype(int)
    values = {"language": ["ru", "en", "code"], "domain": list("abcde"), "style": ["news", "books", "web"]}
    return [
        BucketInfo(f"b{i}", {label: str(rng.choice(known)) for label, known in values.items()}, int(size))
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_targets_hold_in_the_stage_in_ten_batches_and_in_every_batch(seed: int) -> None:
    targets = {"language=ru": 0.85, "language=en": 0.1, "domain=a": 0.3, "style=news|books": 0.4}
    limited = {"max_epochs": {"all": 500.0, "domain=c": 40.0}, "rates": {"style=web": 0.05}}
    plan = plan_of(crossing_labels(seed), tokens=10 * 36_000_000, targets=targets, **limited)
    patterns = [parse_pattern(pattern) for pattern in targets]
    member = np.array([[matches(pattern, b.name, b.labels) for b in plan.buckets] for pattern in patterns])
    wanted = np.array(list(targets.values()))
    assert np.abs(member @ plan.quotas / plan.total_rows - wanted).max() < 1e-5
    rng = np.random.default_rng(seed)
    for start in (0, plan.total_rows - 7680, *rng.integers(0, plan.total_rows - 7680, 60)):
        bucket, _, _ = plan.locate(np.arange(start, start + 7680))
        of_batches = member[:, bucket].reshape(len(targets), 10, 768).mean(axis=2)
        assert np.abs(of_batches - wanted[:, None]).max() <= 0.005
        assert np.abs(of_batches.mean(axis=1) - wanted).max() <= 0.002
    for usage, share in zip(target_usages(plan, MixtureConfig(targets=targets)), wanted, strict=True):
        assert usage.share == pytest.approx(share, abs=1e-5)
    assert all(bucket.quota <= 40 * bucket.rows for bucket in plan.buckets if bucket.labels["domain"] == "c")


@pytest.mark.parametrize("num_targets", [2, 3])
def test_no_run_of_rows_is_off_by_more_than_the_bound_says(num_targets: int) -> None:
    rng = np.random.default_rng(num_targets)
    buckets = [
        BucketInfo(f"b{i}", {f"l{t}": str(i >> t & 1) for t in range(num_targets)}, int(rng.integers(1, 10**6)))
        for i in range(2**num_targets * 3)
    ]
    mixture = {"targets": {f"l{t}=1": 0.3 + 0.2 * t for t in range(num_targets)}}
    plan = plan_of(buckets, tokens=10 * 20_000_011, **mixture)
    usages = target_usages(plan, MixtureConfig(**mixture))
    for usage in usages:
        ones = np.array([matches(parse_pattern(usage.pattern), b.name, b.labels) for b in plan.buckets])
        prefixes = [int(row) for row in rng.integers(0, plan.total_rows, 300)]
        error = np.array([plan.consumed(row)[ones].sum() - usage.share * row for row in prefixes])
        assert error.max() - error.min() <= usage.batch_bound
        assert usage.batch_bound < 0.005 * 768 + 1


def refused(match: str, **mixture) -> str:
    with pytest.raises(UserError, match=match) as caught:
        plan_of(**mixture)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_conflict_names_a_minimal_set_and_what_can_be_reached() -> None:
    # 9,000 Russian rows, at most twice each, are 18,000 of 40,000.
    message = refused(
        r"language=ru needs 85\.0% but can be at most 45\.0% with max_epochs language=ru: 2\.",
        tokens=400_000,
        targets={"language=ru": 0.85, "source=code": 0.05},
        max_epochs={"language=ru": 2.0, "source=books": 50.0},
    )
    assert "books" not in message
    assert "closest to all targets would be language=ru 45.0%, source=code 5.0%" in message
    message = refused(
        "cannot all be met",
        tokens=10_000,
        targets={"language=ru": 0.2, "source=books": 0.3, "language=en": 0.5},
    )
    assert "language=ru needs 20.0% but can be at least 30.0% with source=books at 30.0%" in message
    assert "source=books needs 30.0% but can be at most 20.0% with language=ru at 20.0%" in message
    assert "language=en needs" not in message
    refused("language=ru at 60.0%", tokens=10_000, targets={"language=ru": 0.6, "language=en": 0.5})
    nothing = {"rates": {"source=code": 0.0}, "targets": {"source=code": 0.05}}
    refused(r"source=code needs 5\.0% but can be at most 0\.0%", tokens=10_000, **nothing)
    refused(
        r"budget is 40,000 rows, but data\.mixture\.max_epochs allows no more than 30,000",
        tokens=400_000,
        max_epochs={"all": 2.0},
    )


def test_limits_that_just_suffice_are_met() -> None:
    found = quotas(plan_of(tokens=200_000, targets={"language=ru": 0.9}, max_epochs={"language=ru": 2.0}))
    assert [found[name] for name in ("cc.news", "cc.blog", "books.law", "books.poetry")] == [8000, 8000, 1800, 200]
    crossing = {"targets": {"language=ru": 0.9, "source=books": 0.1}, "max_epochs": {"all": 2.0, "source=web": 0.3}}
    found = quotas(plan_of(tokens=200_000, **crossing))
    assert found["books.law"] + found["books.poetry"] == 2000
    assert found["web.en"] == 1500 or found["web.en"] + found["code"] == 2000


def test_patterns() -> None:
    assert parse_pattern("all") == {}
    assert parse_pattern("style=news|ads, source=cc") == {"style": ("ads", "news"), "source": ("cc",)}
    assert list(MixtureConfig(rates={"style=news|ads,source = cc": 1.0}).rates) == ["source=cc, style=ads|news"]
    for text in ("", "news", "style=", "=news", "style=a|", "style=a, style=b"):
        with pytest.raises(ValidationError, match=r"is no pattern|twice"):
            MixtureConfig(rates={text: 1.0})
    with pytest.raises(ValidationError, match="are the same pattern"):
        MixtureConfig(rates={"a=1, b=2": 1.0, "b=2, a=1": 2.0})
    message = refused(r"data\.mixture\.rates: 'style=noose' matches no bucket", rates={"style=noose": 0.5})
    assert "labels there are: domain: law, poetry; language: code, en, ru; source: books, cc, code, web; " in message


def test_what_cannot_be_meant_is_refused() -> None:
    for match, mixture in (
        ("both budgets", {"tokens": 10, "epochs": 1.0}),
        ("groups stand alone: leave rates out", {"rates": {"all": 1.0}, "groups": ({"select": {}, "epochs": 1.0},)}),
        ("greater than 0", {"targets": {"all": 0.0}}),
        ("less than or equal to 1", {"targets": {"all": 1.1}}),
        ("greater than or equal to 1", {"balance": {"all": {"by": "x", "alpha": 0.0, "max_rate": 0.5}}}),
    ):
        with pytest.raises(ValidationError, match=match):
            MixtureConfig(**mixture)
    refused(r"need a budget: set data\.mixture\.tokens or train\.steps", targets={"language=ru": 0.5})
    refused("round to no rows", epochs=1e-9)
    refused("leave no bucket a weight|round to no rows", rates={"all": 0.0}, tokens=100)


def test_a_bucket_goes_on_where_earlier_segments_left_it() -> None:
    before, after = plan_of(epochs=0.4), plan_of(epochs=0.6, reached={"code": 400})

    def code(plan: Plan) -> list[tuple[int, int]]:
        bucket, epoch, row = plan.locate(np.arange(plan.total_rows))
        mine = bucket == [b.name for b in plan.buckets].index("code")
        return list(zip(epoch[mine].tolist(), row[mine].tolist(), strict=True))

    assert sorted(row for _, row in code(before) + code(after)) == list(range(1000))
    over = code(plan_of(epochs=1.0, reached={"code": 700}))
    assert [epoch for epoch, _ in over] == [0] * 300 + [1] * 700


def test_the_worked_examples_of_the_docs() -> None:
    labels = {"news": ("cc", "style", "news"), "blog": ("cc", "style", "blog"), "law": ("books", "domain", "law")}
    labels["poetry"] = ("books", "domain", "poetry")
    rows = {"news": 4000, "blog": 4000, "law": 900, "poetry": 100}
    buckets = [
        BucketInfo(name, {"source": source, label: value, "language": "ru"}, rows[name])
        for name, (source, label, value) in labels.items()
    ]
    buckets.append(BucketInfo("en", {"source": "web", "language": "en"}, 5000))
    few_news, russian = {"rates": {"style=news": 0.1}}, {"tokens": 100_000, "targets": {"language=ru": 0.9}}
    for expected, mixture in (
        ((1200, 1200, 270, 30, 1500), {"epochs": 0.3}),
        ((400, 4000, 900, 100, 5000), few_news),
        ((1200, 12000, 2700, 300, 15000), {**few_news, "epochs": 3.0}),
        ((4000, 4000, 900, 100, 1000), russian),
        ((2000, 5600, 1260, 140, 1000), {**russian, "max_epochs": {"style=news": 0.5}}),
    ):
        found = quotas(plan_of(buckets, **mixture))
        assert tuple(found[bucket.name] for bucket in buckets) == expected
