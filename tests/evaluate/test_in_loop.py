"""What an evaluation remembers: when it is due, which step is the best, and why a run stops, after any interruption."""

import json
import math

import pytest

from tlite_jax.best import BOARD_FILE, best_step, best_step_on_disk
from tlite_jax.config import EvaluationConfig
from tlite_jax.config.evaluation import BestConfig, WatchConfig
from tlite_jax.data.buckets import HeldOutBucket
from tlite_jax.errors import UserError
from tlite_jax.evaluate.bits_per_byte import NotFiniteError, Score
from tlite_jax.evaluate.board import Board, Measurement
from tlite_jax.evaluate.in_loop import ALERTS_FILE, BEST_FILE, SAMPLES_FILE, InLoopEvaluation, Keys

BUCKETS = [HeldOutBucket(name, {"language": name}, False, ()) for name in ("ru", "en")]
TEXT = Keys("text", None)
WATCH = WatchConfig(select={"language": "en"}, worse_by=0.5)
BEST = BestConfig(objective={"language=ru": 1.0, "delta:language=en": 0.3})


def measured(russian: float, english: float) -> Measurement:
    return Measurement(
        {name: Score(bits * math.log(2) * 100, 100, 10) for name, bits in (("ru", russian), ("en", english))}, {}
    )


def make(directory, *, start_step=None, held=(), keys=TEXT, sample=None, tasks=None, start=True, **config):
    """Its "parameters" are the bits per byte that it measures."""
    config = {"watch": (WATCH,), "best": BEST, **config}
    base = measured(2.0, 1.0)
    return InLoopEvaluation(
        directory,
        Board(BUCKETS, [], EvaluationConfig(every=5, **config), base),
        keys,
        lambda params: (measured(*params), {"evaluation_tokens": 20.0}),
        start=base if start else None,
        sample=sample,
        tasks=tasks,
        every=5,
        total_steps=22,
        start_step=start_step,
        held=held,
    )


def lines(directory, name=BOARD_FILE) -> list:
    path = directory / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_it_is_due_at_the_start_every_so_many_steps_and_at_the_end(tmp_path):
    evaluation = make(tmp_path)
    assert [step for step in range(23) if evaluation.due(step)] == [0, 5, 10, 15, 20, 22]
    evaluation(5, (1.9, 1.0))
    assert not evaluation.due(5)


def test_the_base_is_not_measured_twice(tmp_path):
    first = make(tmp_path)(0, None)
    assert first.metrics["bits_per_byte_delta/language=ru"] == 0
    assert "evaluation_tokens" not in first.metrics
    assert make(tmp_path / "other", start=False)(0, (2.5, 1.0)).metrics["bits_per_byte/language=ru"] == pytest.approx(
        2.5
    )


def test_the_best_is_the_smallest_objective_and_never_where_it_came_from(tmp_path):
    evaluation = make(tmp_path)
    scores = {0: (2.0, 1.0), 5: (2.1, 1.0), 10: (1.5, 1.1), 15: (1.49, 1.4), 20: (1.5, 1.1)}
    improved = {step: evaluation(step, params).improved for step, params in scores.items()}
    assert improved == {0: False, 5: True, 10: True, 15: False, 20: False}
    assert json.loads((tmp_path / BEST_FILE).read_text())["step"] == 10
    assert evaluation.kept([5, 10, 15]) == (10,)
    assert evaluation.kept([5, 15]) == (15,)  # of those that there are
    assert evaluation.kept([3]) == ()
    assert best_step_on_disk(tmp_path, [5, 10, 15]) == 10
    assert best_step_on_disk(tmp_path, [7]) is None
    assert best_step_on_disk(tmp_path / "absent", [5]) is None


def test_equals_go_to_the_earliest():
    records = [{"step": 5, "objective": 1.0}, {"step": 3, "objective": 1.0}, {"step": 1, "objective": None}]
    assert best_step(records, [1, 3, 5]) == 3


def test_a_run_that_goes_on_remembers_up_to_its_checkpoint(tmp_path):
    first = make(tmp_path)
    for step, params in {0: (2.0, 1.0), 5: (1.5, 1.0), 10: (1.8, 1.6), 15: (1.0, 1.0)}.items():
        first(step, params)
    assert [line["step"] for line in lines(tmp_path, ALERTS_FILE)] == [10]
    with (tmp_path / BOARD_FILE).open("ab") as file:
        file.write(b'{"step": 20, "torn')
    resumed = make(tmp_path, start_step=12, held=[5, 12])
    assert [line["step"] for line in lines(tmp_path)] == [0, 5, 10]
    assert not resumed.due(10)
    assert resumed.due(15)
    assert not resumed(15, (1.6, 1.0)).improved
    assert json.loads((tmp_path / BEST_FILE).read_text())["step"] == 5
    assert resumed(20, (1.4, 1.0)).improved
    anew = make(tmp_path)
    assert not (tmp_path / BEST_FILE).exists()
    assert lines(tmp_path) == lines(tmp_path, ALERTS_FILE) == []
    assert anew.due(0)


def test_a_step_saved_but_not_evaluated_is_due_when_the_run_goes_on(tmp_path):
    make(tmp_path)(5, (1.5, 1.0))
    assert make(tmp_path, start_step=10, held=[10]).due(10)


def test_a_better_step_whose_checkpoint_is_gone_does_not_stand_in_the_way(tmp_path):
    make(tmp_path)(5, (1.0, 1.0))
    assert make(tmp_path, start_step=6, held=[6])(10, (1.5, 1.0)).improved


def test_another_objective_judges_the_past_anew(tmp_path):
    first = make(tmp_path)
    for step, params in {5: (1.5, 1.4), 10: (1.6, 1.0)}.items():
        first(step, params)
    assert best_step_on_disk(tmp_path, [5, 10]) == 10
    make(tmp_path, start_step=10, held=[5, 10], best=BestConfig(objective={"language=ru": 1.0}))
    assert best_step_on_disk(tmp_path, [5, 10]) == 5
    make(tmp_path, start_step=10, held=[5, 10], best=None)
    assert best_step_on_disk(tmp_path, [5, 10]) is None


def test_other_text_is_not_compared_with(tmp_path):
    make(tmp_path)(5, (0.1, 1.0))
    other = make(tmp_path, start_step=5, held=[5], keys=Keys("other text", None))
    assert best_step_on_disk(tmp_path, [5]) is None
    assert other.due(5)
    assert other(10, (1.9, 1.0)).improved


def test_alerts_stop_where_they_are_told_to_and_stay_stopped(tmp_path):
    stop = WATCH.model_copy(update={"action": "stop"})
    evaluation = make(tmp_path, watch=(stop,))
    assert evaluation.stopped is None
    assert evaluation(5, (1.5, 1.4)).stop is None
    outcome = evaluation(10, (1.5, 1.6))
    assert outcome.stop.startswith(
        "stopped at step 10 by evaluation.watch: ALERT language=en: 0.6000 bits per byte worse"
    )
    assert make(tmp_path, watch=(WATCH,))(10, (1.5, 1.6)).stop is None
    for directory in (tmp_path / "again",):
        make(directory, watch=(stop,))(10, (1.5, 1.6))
        assert make(directory, watch=(stop,), start_step=10, held=[10]).stopped is not None
        assert make(directory, watch=(WATCH,), start_step=10, held=[10]).stopped is None
        higher = stop.model_copy(update={"worse_by": 0.7})
        assert make(directory, watch=(higher,), start_step=10, held=[10]).stopped is None


def test_samples_are_kept_and_shown(tmp_path):
    evaluation = make(tmp_path, sample=lambda params: {"Привет": ", мир"})
    assert evaluation(5, (1.5, 1.0)).texts == {"samples/0": "Привет, мир"}
    assert lines(tmp_path, SAMPLES_FILE) == [{"step": 5, "prompt": "Привет", "continuation": ", мир"}]


def test_tasks_are_kept_and_shown_beside_the_start(tmp_path):
    evaluation = make(tmp_path, tasks=lambda step, params: {"tasks/songs/acc": 0.5 + step / 100} if step != 10 else {})
    assert evaluation(0, None).metrics["tasks/songs/acc"] == 0.5
    assert "tasks/songs/acc 0.5500, 0.5000 at step 0" in evaluation(5, (1.5, 1.0)).table.notes
    assert "tasks/songs/acc" not in evaluation(10, (1.5, 1.0)).metrics
    assert [line["tasks"] for line in lines(tmp_path)] == [{"tasks/songs/acc": 0.5}, {"tasks/songs/acc": 0.55}, {}]


def test_what_is_not_finite_names_step_and_bucket(tmp_path):
    def broken(params):
        raise NotFiniteError("the loss on held-out bucket ru is nan")

    evaluation = make(tmp_path)
    evaluation._measure = broken
    with pytest.raises(FloatingPointError, match="the loss on held-out bucket ru is nan at step 5"):
        evaluation(5, None)
    assert lines(tmp_path) == []


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / BOARD_FILE).write_text("something\n{}\n")
    with pytest.raises(UserError, match=r"board.jsonl:1 is not a line of ours; remove that line or move the file away"):
        make(tmp_path, start_step=5)
