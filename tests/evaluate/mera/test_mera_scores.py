"""Metrics on answers worked out by hand, and the total."""

import pytest

from tlite_jax.evaluate.mera import metrics
from tlite_jax.evaluate.mera.score import score_task, task_score, total_score
from tlite_jax.evaluate.mera.tasks import TASKS, TOTAL_TASKS

TASK = {task.name: task for task in TASKS}


def pairs(*outputs_and_answers, **meta) -> list:
    return [({"outputs": gold, "inputs": {}, "meta": meta}, answer) for gold, answer in outputs_and_answers]


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "em"),
    [
        ("Тверь", "тверь!", 1, 1),
        ("город  Тверь", "Тверь", 2 / 3, 0),
        ("Тверь Тверь", "Тверь Псков", 1 / 2, 0),
        ("the Tver", "Tver", 1, 1),
        ("«Тверь»", "Тверь", 0, 0),  # only ASCII punctuation goes
        ("", "Тверь", 0, 0),
        ("...", "the", 1, 1),  # nothing is left on either side
    ],
)
def test_words_in_common(prediction, gold, f1, em):
    assert metrics.token_f1(prediction, [gold]) == pytest.approx(f1)
    assert metrics.exact_match(prediction, [gold]) == em


def test_chegeka_takes_the_best_of_several_answers():
    scores = score_task(TASK["CheGeKa"], pairs(("река;Волга", "волга"), ("Ока", "на Оке")))
    assert scores == {"f1": 0.5, "em": 0.5}


def test_multiq_compares_segments():
    spans = [{"segment": "Тверь"}, {"segment": "город Тверь"}]
    assert score_task(TASK["MultiQ"], pairs((spans, "город Тверь"))) == {"f1": 1, "em": 1}


def test_macro_f1_counts_every_label_that_occurs():
    # 1: 2 * 1 / 3, 2: 2 * 1 / 2, 3: only predicted, 0.
    found = metrics.f1_macro([("1", "1"), ("1", "3"), ("2", "2")])
    assert found == pytest.approx((2 / 3 + 1 + 0) / 3)
    scores = score_task(TASK["RCB"], pairs(("1", "1"), ("1", "3"), ("2", "2")))
    assert scores == {"acc": pytest.approx(2 / 3), "f1_macro": pytest.approx(found)}


def test_parts_are_shown_and_do_not_count():
    scores = score_task(
        TASK["ruMMLU"], pairs(("A", "A"), ("A", "B"), domain="anatomy") + pairs(("C", "C"), domain="law")
    )
    assert scores == {"acc": pytest.approx(2 / 3), "acc.anatomy": 0.5, "acc.law": 1}
    assert task_score(scores) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("kind", "id_task", "answer", "prediction", "points"),
    [
        ("text", "6", "холодный,хладный", " Холодный. 7", 1),
        ("text", "6", "холодный", "холодный мороз", 0),
        ("matching", "26", "4,9,2,8", "4,2,9,8", 2),
        ("matching", "26", "4,9,2,8", "4,9,2", 0),
        ("multiple_choice_based_on_text", "3", "2,3", "3,2", 1),
        ("multiple_choice_based_on_text", "3", "2,3", "2,3,4", 0),
        ("multiple_choice_based_on_text", "3", "2,3", "2,2,3", 1),
        ("multiple_choice_independent_options", "16", "2,3", "2,4", 1),
        ("multiple_choice_independent_options", "16", "2,3", "3,2", 2),
        ("multiple_choice_independent_options", "16", "2,3", "2", 1),
        ("multiple_choice_independent_options", "16", "2,3", "1,4,5", 0),
    ],
)
def test_exam_points(kind, id_task, answer, prediction, points):
    assert metrics.use_points(kind, id_task, answer, prediction) == points


def test_the_exams_grade_is_a_mean_over_variants():
    first = pairs(("1", "1"), ("2", "2"), type="multiple_choice_based_on_text", id_task="1", variant=0)
    second = pairs(("4,9,2,8", "4,9,2,1"), type="matching", id_task="26", variant=1)
    assert score_task(TASK["USE"], first + second) == {"grade_norm": pytest.approx((2 / 34 + 3 / 34) / 2)}


def test_pass_at_k_is_unbiased():
    # One right of three: chance that two drawn hold it.
    assert metrics.pass_at_k(3, 1, 2) == pytest.approx(2 / 3)
    assert metrics.pass_at_k(3, 2, 2) == 1
    assert metrics.pass_at_k(10, 0, 10) == 0
    expected = ["1", "2"]
    samples = [["1", "2"], ["1", None], [None, "2"], "timed out", ["1"]] + [["1", "3"]] * 5
    scores = score_task(TASK["ruHumanEval"], pairs((expected, samples)))
    assert scores == {"pass@1": pytest.approx(0.1), "pass@5": pytest.approx(0.5), "pass@10": 1}


def test_ethics_correlates_each_criterion():
    documents = [
        ({"law": "1", "moral": "0"}, "1"),
        ({"law": "0", "moral": "1"}, "0"),
        ({"law": "0", "moral": "0"}, "0"),
    ]
    scores = score_task(TASK["ruEthics"], pairs(*documents, question="good"))
    # moral: no hit, one false alarm, one miss, one correct zero.
    assert scores == {"good.law": 1, "good.moral": pytest.approx(-0.5)}
    assert metrics.matthews([(1.0, 1.0), (0.0, 1.0)]) == 0


def test_the_total_is_a_mean_of_means():
    results = {task.name: {"acc": 0.5, "acc.part": 1.0} for task in TOTAL_TASKS}
    results |= {"MultiQ": {"f1": 0.4, "em": 0.2}, "USE": {"grade_norm": 0.1}, "ruHHH": {"acc": 1.0}}
    assert len(TOTAL_TASKS) == 17
    assert total_score(results) == pytest.approx((15 * 0.5 + 0.3 + 0.1) / 17)
    del results["USE"]
    assert total_score(results) is None
