"""Steps that are not finite: nothing is learned of them, they are written down, and too many end the run."""

import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.config import RunConfig
from tlite_jax.data.buckets import BucketStore
from tlite_jax.errors import UserError
from tlite_jax.train.directory import ANOMALIES_FILE as FILE
from tlite_jax.train.run import open_run


def config(output: Path, *words: str) -> RunConfig:
    return tiny.config(output, *tiny.from_imported(), *words)


class Broken:
    """Makes the loss of some steps NaN, through one parameter that is mended after the step; may signal before one."""

    def __init__(self, *steps: int, stop_in: int | None = None):
        self.steps, self.stop_in = steps, stop_in
        self.before_and_after: list = []

    def __call__(self, step_fn):
        def step(state, batch):
            number = int(state.step) + 1
            if number == self.stop_in:
                signal.raise_signal(signal.SIGTERM)
            if number not in self.steps:
                return step_fn(state, batch)
            good = np.asarray(state.params["final_norm"])
            state = self._with_norm(state, np.full_like(good, np.nan))
            before = jax.tree.map(np.array, state)
            state, metrics = step_fn(state, batch)
            self.before_and_after.append((before, jax.tree.map(np.array, state)))
            return self._with_norm(state, good), metrics

        return step

    def _with_norm(self, state, value):
        placed = jax.device_put(value, state.params["final_norm"].sharding)
        return state._replace(params={**state.params, "final_norm": placed})


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / FILE).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Broken]:
    """A run of 6 steps, the third of which is not finite, with a checkpoint due after it."""
    output, broken = tmp_path_factory.mktemp("skipping") / "run", Broken(3)
    tiny.start(config(output, "checkpoint.every=3", "train.log_every=2"), around_step=broken)
    return output, broken


def test_a_skipped_step_changes_no_bit_but_the_step(skipping: tuple[Path, Broken]) -> None:
    ((before, after),) = skipping[1].before_and_after
    assert (before.step, after.step) == (2, 3)
    assert before.optimizer.num_updates == after.optimizer.num_updates == 2
    for old, new in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        assert old.tobytes() == new.tobytes()
    assert tiny.state(find(skipping[0]))["['num_updates']"] == 5


def test_it_is_logged_and_not_the_one_that_is_saved(skipping: tuple[Path, Broken]) -> None:
    run, _ = skipping
    assert tiny.metrics(run, "skipped") == {2: 0, 3: 1, 4: 0, 6: 0}
    assert np.isnan(tiny.metrics(run)[3])
    assert steps_on_disk(run) == [4, 6]


def test_its_rows_and_documents_are_those_that_were_read(skipping: tuple[Path, Broken]) -> None:
    run, _ = skipping
    (line,) = lines(run)
    assert (line["step"], line["kind"], line["loss"], line["gradient_norm"]) == (3, "not_finite", "nan", "nan")
    assert line["first_row"] == 2 * tiny.BATCH_SIZE
    plan = open_run(config(run)).plan
    bucket, _, rows = plan.locate(np.arange(2 * tiny.BATCH_SIZE, 3 * tiny.BATCH_SIZE))
    names = [plan.buckets[number].name for number in bucket]
    assert [(row["bucket"], row["row"]) for row in line["rows"]] == list(zip(names, rows.tolist(), strict=True))
    store = BucketStore.open(config(run).data.buckets)
    for row in line["rows"]:
        starts, _ = store.buckets[row["bucket"]].documents(row["row"])
        assert len(starts) == len(row["starts"]) <= row["documents"][1] - row["documents"][0] + 1


def test_stopped_at_it_and_resumed_equals_undisturbed(skipping: tuple[Path, Broken], tmp_path: Path) -> None:
    whole, asked = skipping[0], config(tmp_path / "run", "checkpoint.every=3", "train.log_every=2")
    # The signal is heard when the step under way is done: the skipped one is saved, its parameters being finite.
    assert tiny.start(asked, around_step=Broken(3, stop_in=3)).step == 3
    assert steps_on_disk(tmp_path / "run") == [3]
    tiny.start(asked, around_step=Broken(3))
    assert tiny.metrics(tmp_path / "run") == pytest.approx(tiny.metrics(whole), abs=0, nan_ok=True)
    assert lines(tmp_path / "run") == lines(whole)
    tiny.assert_same_state(find(tmp_path / "run"), find(whole))


def test_too_many_in_a_row_end_the_run_and_none_is_saved(tmp_path: Path) -> None:
    words = ["train.max_skipped_in_a_row=2", "train.log_every=100", "checkpoint.every=1"]
    asked = config(tmp_path / "run", *words)
    with pytest.raises(FloatingPointError, match=r"at steps 4 to 5 .*rewind .*run --skip 4\.\.5"):
        tiny.start(asked, around_step=Broken(2, 4, 5))
    assert steps_on_disk(tmp_path / "run") == [1, 3]
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 5]
    # What was written after the checkpoint is not there twice.
    tiny.start(asked, around_step=Broken(5))
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 5]


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    asked = config(tmp_path / "run", "train.max_skipped_in_a_row=2")
    tiny.start(asked, around_step=Broken(3, stop_in=3))
    with pytest.raises(FloatingPointError, match="at steps 3 to 4"):
        tiny.start(asked, around_step=Broken(4))
    assert steps_on_disk(tmp_path / "run") == [3]


def test_parameters_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def around(step_fn):
        def step(state, batch):
            state, metrics = step_fn(state, batch)
            broken = state.params["final_norm"] * jnp.inf * 0 if state.step == 5 else state.params["final_norm"]
            return state._replace(params={**state.params, "final_norm": broken}), metrics

        return step

    with pytest.raises(FloatingPointError, match="parameters are not finite after 1 skipped steps"):
        tiny.start(config(tmp_path / "run"), around_step=around)
    assert steps_on_disk(tmp_path / "run") == []


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    asked = config(tmp_path / "run", "train.steps=2")
    tiny.start(asked, around_step=Broken(2))
    (tmp_path / "run" / FILE).write_text("what\n{}\n")
    with pytest.raises(UserError, match=f"{FILE}:1 is not a line of anomalies"):
        tiny.start(asked)
