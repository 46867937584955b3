"""The board's arithmetic: groups, deltas, alerts, objectives, and what is refused."""

import math

import pytest

from tlite_jax.config import EvaluationConfig
from tlite_jax.config.evaluation import BestConfig, KLConfig, TasksConfig, WatchConfig, parse_term
from tlite_jax.data.buckets import HeldOutBucket
from tlite_jax.errors import UserError
from tlite_jax.evaluate.bits_per_byte import Score
from tlite_jax.evaluate.board import Board, Measurement
from tlite_jax.evaluate.divergence import Divergence
from tlite_jax.evaluate.groups import group_of, label_groups

BUCKETS = [
    HeldOutBucket("wiki.ru", {"source": "wiki", "language": "ru"}, False, ()),
    HeldOutBucket("wiki.en", {"source": "wiki", "language": "en"}, False, ()),
    HeldOutBucket("law.ru", {"source": "law", "language": "ru"}, False, ()),
    HeldOutBucket("exam.en", {"source": "exam", "language": "en"}, True, ()),
]
SAMPLED = ["wiki.en", "exam.en"]


def score(bits: float, num_bytes: int = 100) -> Score:
    return Score(bits * math.log(2) * num_bytes, num_bytes, 10)


BASE = Measurement({"wiki.ru": score(2.0), "wiki.en": score(1.0), "law.ru": score(3.0, 300), "exam.en": score(1.5)}, {})
NOW = Measurement(
    {"wiki.ru": score(1.5), "wiki.en": score(1.03), "law.ru": score(2.0, 300), "exam.en": score(1.4)},
    {"wiki.en": Divergence(2.0, 100), "exam.en": Divergence(60.0, 300)},
)


def board(**config) -> Board:
    return Board(BUCKETS, SAMPLED, EvaluationConfig(every=1, kl=KLConfig(tokens=1), **config), BASE)


def lines(**config) -> dict:
    return {line.name: line for line in board(**config).lines(NOW)}


def test_groups_are_exact_over_bytes_and_leave_out_what_is_never_trained():
    found = lines()
    assert list(found) == [
        "all", "source=exam", "source=law", "source=wiki", "language=en", "language=ru",
        "wiki.ru", "wiki.en", "law.ru", "exam.en",
    ]  # fmt: skip
    russian = found["language=ru"]
    assert russian.bits == pytest.approx((1.5 * 100 + 2.0 * 300) / 400)
    assert russian.base == pytest.approx((2.0 * 100 + 3.0 * 300) / 400)
    assert russian.delta == pytest.approx(russian.bits - russian.base)
    assert russian.kl is None
    english = found["language=en"]
    assert (english.bits, english.base) == pytest.approx((1.03, 1.0))
    assert english.kl == pytest.approx(2.0 / 100)
    # Where nothing of it is trained on, the never trained are what it speaks of.
    assert found["source=exam"].bits == pytest.approx(1.4)
    assert found["source=exam"].kl == pytest.approx(0.2)
    assert found["all"].bits == pytest.approx((1.5 * 100 + 1.03 * 100 + 2.0 * 300) / 500)


def test_selectors_may_join_labels():
    joined = {"language": "ru", "source": "law"}
    found = lines(watch=(WatchConfig(select=joined, worse_by=1.0),))
    assert next(iter(found)) == "language=ru,source=law"
    assert found["language=ru,source=law"].bits == pytest.approx(2.0)


@pytest.mark.parametrize(("limit", "expected"), [(0.029, 1), (0.031, 0)])
def test_alerts_come_beyond_the_limit(limit, expected):
    watch = WatchConfig(select={"language": "en"}, worse_by=limit, action="stop")
    made = board(watch=(watch,))
    alerts = made.alerts(NOW)
    assert len(alerts) == expected
    assert made.metrics(NOW)["alert/bits_per_byte/language=en"] == expected
    assert len(made.table(NOW).alerts) == expected
    for alert in alerts:
        assert alert.worse_by == pytest.approx(0.03)
        assert str(alert) == f"ALERT language=en: 0.0300 bits per byte worse than the base, the limit is {limit}"


def test_alerts_of_divergence_and_never_on_what_has_improved():
    made = board(
        watch=(
            WatchConfig(select={"source": "exam"}, metric="kl", worse_by=0.1),
            WatchConfig(select={"language": "ru"}, worse_by=1e-9),
        )
    )
    (alert,) = made.alerts(NOW)
    assert (alert.name, alert.metric, alert.worse_by, alert.action) == ("source=exam", "kl", pytest.approx(0.2), "log")
    assert "nats a token away from the base" in str(alert)
    metrics = made.metrics(NOW)
    assert (metrics["alert/kl/source=exam"], metrics["alert/bits_per_byte/language=ru"]) == (1.0, 0.0)


def test_objectives_weigh_metrics():
    best = BestConfig(objective={"language=ru": 1.0, "delta:language=en": 0.3, "kl:language=en,source=exam": -2.0})
    made = board(best=best)
    expected = (1.5 * 100 + 2.0 * 300) / 400 + 0.3 * 0.03 - 2 * 0.2
    assert made.objective(NOW) == pytest.approx(expected)
    assert made.metrics(NOW)["objective"] == pytest.approx(expected)
    assert made.objective(NOW._replace(divergences={})) is None
    assert board().objective(NOW) is None
    assert made.table(NOW, best=40).notes == (f"objective {expected:.4f}, best at step 40",)


def test_measurements_come_back_from_json():
    assert Measurement.from_json(NOW.to_json()) == NOW


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"watch": (WatchConfig(select={"language": "fr"}, worse_by=1.0),)},
         r"evaluation.watch\[0\].select language=fr matches no held-out bucket; there are source=exam\|law\|wiki, "
         r"language=en\|ru"),
        ({"best": BestConfig(objective={"language=ru,source=exam": 1.0})},
         "evaluation.best.objective language=ru,source=exam matches no held-out bucket"),
        ({"watch": (WatchConfig(select={"language": "ru"}, metric="kl", worse_by=1.0),)},
         r"evaluation.watch\[0\].select language=ru: no bucket of it is in the sample that evaluation.kl.select names"),
    ],
)  # fmt: skip
def test_selectors_of_nothing_are_refused(config, match):
    with pytest.raises(UserError, match=match):
        board(**config)


def test_without_held_out_text_the_mend_is_named():
    with pytest.raises(UserError, match=r"set data.prepare.held_out.fraction and prepare again"):
        group_of({"language": "ru"}, [], "evaluation.watch[0].select")


def test_a_table_of_many_labels_stays_readable():
    buckets = [HeldOutBucket(f"b{n}", {"source": f"s{n}", "language": "ru"}, False, ()) for n in range(200)]
    base = Measurement({bucket.name: score(1.0) for bucket in buckets}, {})
    now = Measurement({bucket.name: score(1.0 + (n == 150) - n / 1000) for n, bucket in enumerate(buckets)}, {})
    config = EvaluationConfig(every=1, watch=(WatchConfig(select={"source": "s199"}, worse_by=5.0),))
    made = Board(buckets, [], config, base)
    table = made.table(now)
    names = [row[0] for row in table.rows]
    assert len(names) == 30
    assert names[:3] == ["source=s199", "all", "source=s150"]
    assert table.notes == ("172 more groups, less worse than these, are in board.jsonl",)
    assert len(label_groups(buckets)) == 201
    widths = {len(line) for line in table.lines()[:-1]}
    assert len(widths) == 1


@pytest.mark.parametrize("text", ["", "ru", "language=", "=ru", "kl:", "delta:language", "language=ru,"])
def test_terms_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="is not a term: write label=value"):
        parse_term(text)


def test_terms_are_read():
    assert parse_term("all") == ("bits_per_byte", {})
    assert parse_term("kl:all") == ("kl", {})
    assert parse_term("bits_per_byte:language=ru") == ("bits_per_byte", {"language": "ru"})
    assert parse_term("delta:language=en, domain=a:b") == ("delta", {"language": "en", "domain": "a:b"})


def test_what_is_not_measured_cannot_be_asked_for():
    with pytest.raises(ValueError, match="kl, watch, best, tasks and samples need evaluation: give every"):
        EvaluationConfig(watch=(WatchConfig(select={}, worse_by=1.0),))
    with pytest.raises(
        ValueError, match=r"watch\[0\] needs KL\(base \|\| now\), which is not measured: give kl.tokens"
    ):
        EvaluationConfig(every=1, watch=(WatchConfig(select={}, metric="kl", worse_by=1.0),))
    with pytest.raises(ValueError, match=r"best.objective 'kl:all' needs KL"):
        EvaluationConfig(every=1, best=BestConfig(objective={"kl:all": 1.0}))
    with pytest.raises(ValueError, match=r"tasks.every 5 is not a multiple of every 2"):
        EvaluationConfig(every=2, tasks=TasksConfig(names=("arc_easy",), every=5))
