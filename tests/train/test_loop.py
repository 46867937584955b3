"""The loop: resumed runs equal uninterrupted ones, signals save and stop, metrics and failures are told."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity

from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.config import RunConfig
from tlite_jax.telemetry.evaluated import Evaluated
from tlite_jax.telemetry.goodput import FILE, account, read_starts
from tlite_jax.train import loop


def config(output: Path, *words: str) -> RunConfig:
    """A run that starts from the imported model."""
    return tiny.config(output, *tiny.from_imported(), *words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    tiny.start(config(output))
    return output


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGINT) -> None:
    """Sends a real signal to this process while the batch of a step is being read."""
    real = loop.batches

    def batches(plan, store, **options):
        start = options["start_row"] // tiny.BATCH_SIZE + 1
        for count, batch in enumerate(real(plan, store, **options), start=start):
            if count == step:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(loop, "batches", batches)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    at: int, number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    asked = config(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, at, number)
        result = tiny.start(asked)
    assert (result.step, result.signal) == (at, number)
    assert steps_on_disk(tmp_path / "run") == [at]
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    result = tiny.start(asked)
    assert (result.step, result.signal) == (6, None)
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert tiny.metrics(tmp_path / "run", name) == tiny.metrics(whole, name)
    tiny.assert_same_state(find(tmp_path / "run"), find(whole))
    resumed, uninterrupted = find(tmp_path / "run").meta, find(whole).meta
    assert (resumed.rows_consumed, resumed.segments) == (uninterrupted.rows_consumed, uninterrupted.segments)
    starts = [(start.first_step, start.last_step, start.status) for start in read_starts(tmp_path / "run" / FILE)]
    assert starts == [(0, at, number.name), (at, 6, "done")]


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4), (1, 3)])
def test_resumed_on_another_mesh_the_state_is_exact(
    mesh: tuple[int, int], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        tiny.start(asked)
    on, saved = tiny.mesh(*mesh), find(tmp_path / "run")
    assert tiny.state(saved)["['num_updates']"] == 3
    tiny.assert_same_state(saved, saved, on)
    tiny.start(config(tmp_path / "run", f"mesh.replica={mesh[0]}"), on)
    losses, expected = tiny.metrics(tmp_path / "run"), tiny.metrics(whole)
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, rel=5e-7)


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    """N, then N more: with a budget in tokens and a schedule without an end, a run of N is a prefix of one of 2N."""
    budget = f"data.mixture.tokens={4 * tiny.BATCH_SIZE * tiny.LENGTH}"
    words = [budget, "schedule.name=constant_with_warmup"]
    tiny.start(config(tmp_path / "run", *words, "train.steps=2"))
    tiny.start(config(tmp_path / "run", *words, "train.steps=4"))
    tiny.start(config(tmp_path / "whole", *words, "train.steps=4"))
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(tmp_path / "whole")
    tiny.assert_same_state(find(tmp_path / "run"), find(tmp_path / "whole"))


def test_document_masking_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["data.document_masking=true", "train.steps=2", "schedule.warmup_steps=0"]
    tiny.start(config(tmp_path / "whole", *words))
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        tiny.start(config(tmp_path / "run", *words))
    tiny.start(config(tmp_path / "run", *words))
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(tmp_path / "whole")
    tiny.assert_same_state(find(tmp_path / "run"), find(tmp_path / "whole"))


def test_a_signal_during_evaluation_is_heard(tmp_path: Path) -> None:
    def evaluate(step, params) -> Evaluated:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return Evaluated({"score": float(step)})

    asked = config(tmp_path / "run", "checkpoint.every=2")
    result = tiny.start(asked, evaluate=tiny.Evaluation(evaluate, every=2))
    # The save of step 2 was under way: it is not asked for twice.
    assert (result.step, result.signal, steps_on_disk(tmp_path / "run")) == (2, signal.SIGTERM, [2])
    assert tiny.metrics(tmp_path / "run", "score") == {0: 0.0, 2: 2.0}


def test_a_second_ctrl_c_insists(tmp_path: Path) -> None:
    def evaluate(step, params) -> Evaluated:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return Evaluated({})

    with pytest.raises(KeyboardInterrupt):
        tiny.start(config(tmp_path / "run"), evaluate=tiny.Evaluation(evaluate, every=2))
    assert steps_on_disk(tmp_path / "run") == []


def test_killed_after_a_checkpoint_it_logs_each_step_once(whole: Path, tmp_path: Path) -> None:
    """Steps that were logged after the last checkpoint are trained and logged again."""
    shutil.copytree(whole, tmp_path / "run")
    asked = config(tmp_path / "run", "checkpoint.every=2")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    tiny.start(asked)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    tiny.start(asked)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(whole)


def test_metrics_say_how_it_goes(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert {"time", "loss", "gradient_norm", "learning_rate", "tokens_seen"} <= line.keys()
        assert line["tokens_seen"] == line["step"] * tiny.BATCH_SIZE * tiny.LENGTH
    for line in lines[1:]:  # the first step compiles
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(tiny.BATCH_SIZE * tiny.LENGTH)
    rates = [1e-2 * rate for rate in (0, 0.5, 1)]
    assert [line["learning_rate"] for line in lines][:3] == pytest.approx(rates)
    assert lines[-1]["loss"] < lines[0]["loss"] < 2 * np.log(tiny.VOCAB_SIZE)


def test_the_time_of_a_run_is_accounted_for(whole: Path) -> None:
    spent = account(read_starts(whole / FILE))
    assert all(spent.parts[part] > 0 for part in ("restore", "compile", "data_wait", "step", "checkpoint"))
    assert spent.parts["lost"] == spent.parts["restart_wait"] == spent.parts["evaluation"] == 0
    assert spent.parts["other"] < 0.2 * spent.seconds
    assert spent.starts[0].environment["mesh"] == {"replica": 1, "fsdp": 8, "context": 1}


def test_evaluation_is_left_out_of_the_throughput(tmp_path: Path) -> None:
    evaluated = []

    def evaluate(step, params) -> Evaluated:
        evaluated.append(step)
        return Evaluated({"score": 1.0})

    tiny.start(config(tmp_path / "run"), evaluate=tiny.Evaluation(evaluate, every=2))
    assert evaluated == [0, 2, 4, 6]
    assert 1 not in tiny.metrics(tmp_path / "run", "tokens_per_second")
    assert 2 in tiny.metrics(tmp_path / "run", "tokens_per_second")


def test_log_every_thins_out_but_keeps_the_last(tmp_path: Path) -> None:
    tiny.start(config(tmp_path / "run", "train.log_every=4"))
    assert list(tiny.metrics(tmp_path / "run")) == [4, 6]


def test_checkpoints_come_as_often_and_stay_as_long_as_asked(tmp_path: Path) -> None:
    words = ["checkpoint.every=1", "checkpoint.keep_latest=2", "checkpoint.keep_every=3"]
    tiny.start(config(tmp_path / "run", *words))
    assert steps_on_disk(tmp_path / "run") == [3, 5, 6]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["3", "5", "6"]


def test_the_best_step_is_saved_and_kept_whatever_its_age(tmp_path: Path) -> None:
    """Step 2, which is not one to be saved, is the best; step 4 is not."""
    best = 2
    evaluation = tiny.Evaluation(lambda step, params: Evaluated({}, improved=step == best), every=2)
    evaluation.kept = lambda steps: (best,)
    tiny.start(config(tmp_path / "run", "checkpoint.every=3", "checkpoint.keep_latest=1"), evaluate=evaluation)
    assert steps_on_disk(tmp_path / "run") == [2, 6]


def test_an_evaluation_that_says_stop_saves_and_stops(tmp_path: Path) -> None:
    def evaluate(step, params) -> Evaluated:
        return Evaluated({"score": 1.0}, stop="it got worse" if step == 2 else None)

    result = tiny.start(config(tmp_path / "run"), evaluate=tiny.Evaluation(evaluate, every=2))
    assert (result.step, result.signal, result.stopped) == (2, None, "it got worse")
    assert steps_on_disk(tmp_path / "run") == [2]
    evaluation = tiny.Evaluation(evaluate, every=2)
    evaluation.stopped = "it is worse"
    result = tiny.start(config(tmp_path / "run"), evaluate=evaluation)
    assert (result.step, result.stopped) == (2, "it is worse")
    assert list(tiny.metrics(tmp_path / "run")) == [1, 2]
    assert tiny.start(config(tmp_path / "run")).step == 6


def test_a_failed_save_in_the_background_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", full)
    with pytest.raises(Exception, match="No space left on device"):
        tiny.start(config(tmp_path / "run", "checkpoint.every=2"))
    assert steps_on_disk(tmp_path / "run") == []
    monkeypatch.undo()
    # What it left behind does not stand in the way.
    assert tiny.start(config(tmp_path / "run", "checkpoint.every=2")).step == 6
    assert steps_on_disk(tmp_path / "run") == [2, 4, 6]


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    words = ["optimizer.learning_rate=1e30", "schedule.warmup_steps=0", "optimizer.max_gradient_norm=null"]
    words.append("train.max_skipped_in_a_row=1")
    with pytest.raises(FloatingPointError, match=r"not finite at step \d \(.*lower optimizer.learning_rate"):
        tiny.start(config(tmp_path / "run", *words))
    assert steps_on_disk(tmp_path / "run") == []
