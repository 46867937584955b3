"""A run directory has one trainer at a time."""

from pathlib import Path

import pytest

from launch.rewind import main as rewind_command
from tests import tiny
from tlite_jax.errors import UserError
from tlite_jax.train import lock
from tlite_jax.train.run import open_run
from tlite_jax.train.spike_rewind import go_back


def test_a_second_trainer_is_refused_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
    run = tiny.config(tmp_path / "run", *tiny.from_imported())
    tiny.start(run)
    half_written = tmp_path / "run" / "checkpoints" / "9.partial"
    half_written.mkdir()
    longer = tiny.config(tmp_path / "run", *tiny.from_imported(), f"train.steps={tiny.STEPS + 1}")
    before = tiny.contents(tmp_path)
    with lock.locked(tmp_path / "run"), pytest.raises(UserError, match=r"is being trained by process \d+ on .*; wait"):
        tiny.start(longer, allow_change=True)
    assert tiny.contents(tmp_path) == before
    tiny.start(longer, allow_change=True)  # free again
    assert not half_written.exists()


def test_a_lock_that_is_given_back_meanwhile_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, waits = lock.locked(tmp_path), []
    first.__enter__()

    def give_back(seconds: float) -> None:
        waits.append(seconds)
        first.__exit__(None, None, None)

    monkeypatch.setattr(lock.time, "sleep", give_back)
    with lock.locked(tmp_path):
        assert len(waits) == 1


def test_a_start_waits_for_the_last_save_of_the_trainer_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path / "run", *tiny.from_imported(), "checkpoint.every=3")
    tiny.start(config)
    last, hidden = tmp_path / "run" / "checkpoints" / str(tiny.STEPS), tmp_path / "hidden"
    last.rename(hidden)
    before = lock.locked(tmp_path / "run")
    before.__enter__()

    def end(seconds: float) -> None:
        hidden.rename(last)
        before.__exit__(None, None, None)

    monkeypatch.setattr(lock.time, "sleep", end)
    assert open_run(config).start_step == tiny.STEPS


def test_a_run_that_another_trains_does_not_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
    config, mesh = tiny.config(tmp_path / "run", *tiny.from_imported()), tiny.mesh()
    tiny.start(config)
    run = open_run(config, mesh=mesh)
    with lock.locked(tmp_path / "run"):
        with pytest.raises(UserError, match="is being trained by"):
            go_back(run, mesh, tiny.STEPS - 1, tiny.STEPS)
        with pytest.raises(UserError, match="is being trained by"):
            rewind_command(tmp_path / "run", to=tiny.STEPS)
        rewind_command(tmp_path / "run", to=tiny.STEPS, dry_run=True)
    assert not (tmp_path / "run" / "rewound").exists()
    rewind_command(tmp_path / "run", to=tiny.STEPS)
    assert (tmp_path / "run" / "rewound").exists()
