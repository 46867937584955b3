"""The local tier: goes on from the hosts' own disks where it can, and never costs a durable checkpoint."""

import shutil
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.checkpoint.processes import outcomes
from tests.checkpoint.test_checkpoint import meta, random_state
from tests.checkpoint.test_seal import Usage, flip
from tlite_jax.checkpoint import find, local, steps_on_disk
from tlite_jax.checkpoint.copy import publish_copy
from tlite_jax.checkpoint.local import LocalTier
from tlite_jax.checkpoint.parts import claim_parts, parts_of, steps_of
from tlite_jax.checkpoint.peers import alone
from tlite_jax.checkpoint.saver import saver
from tlite_jax.checkpoint.verify import verify_run
from tlite_jax.config import CheckpointConfig
from tlite_jax.errors import UserError
from tlite_jax.train.rewind import rewind
from tlite_jax.train.run import open_run
from tlite_jax.train.step import Step

LOST = "has no part of it (killed while it saved, or on another host)"


@pytest.fixture(scope="module", params=[("1", "cpu"), ("2", "cuda")], ids=["sharded over both", "a replica each"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two real processes, each with a disk of its own, have found; see `local_job`."""
    return outcomes("tests.checkpoint.local_job", tmp_path_factory.mktemp("job"), *request.param)


def test_a_durable_checkpoint_is_made_from_the_parts(found: list[dict]) -> None:
    for process in found:
        assert process["saved"] == []
        assert process["parts"] == [1, 2]
        assert process["durable"] == [1]
        assert process["durable is intact"] == []
        assert process["durable is equal"]
        assert process["last is equal"]


def test_the_newer_parts_are_gone_on_from_to_the_bit(found: list[dict]) -> None:
    for number, process in enumerate(found):
        assert process["newest"] == {"step": 2, "part": number, "told": "", "equal": True}
        assert not process["of another mesh"]


def test_a_damaged_part_is_named_and_the_durable_one_is_used_by_all(found: list[dict]) -> None:
    for process in found:
        assert (process["flipped"]["step"], process["flipped"]["part"], process["flipped"]["equal"]) == (1, None, True)
        assert process["set aside"]
    told = found[0]["flipped"]["told"]
    assert "/process-0/2 is damaged and set aside: process 1: " in told
    assert "its bytes are not those that were written" in told
    assert found[1]["flipped"]["told"] == ""


def test_without_the_part_of_one_the_durable_one_is_used_by_all(found: list[dict]) -> None:
    for process in found:
        assert (process["lost"]["step"], process["lost"]["part"], process["lost"]["equal"]) == (1, None, True)
    assert found[0]["lost"]["told"].endswith(f"local checkpoint 3 is not used: process 1 of 2 {LOST}\n")


def test_a_full_disk_of_one_is_told_by_all_and_durable_saves_go_on(found: list[dict]) -> None:
    for process in found:
        (told,) = process["full"]
        assert told.startswith("checkpoint 4 was not saved locally: ")
        assert "File too large" in told
        assert not process["parts of a failed save"]
        (told,) = process["direct"]
        assert told.startswith("checkpoint 5 is saved without the local disks: ")
        assert process["durable after it"] == [1, 5]
        assert process["healthy again"] == []
        local_one, durable = process["copy failed"]
        assert local_one.startswith("checkpoint 4 was not saved locally: ")
        assert durable.startswith("checkpoint 4 was not saved: ")
        assert (process["left"], process["left of the run"]) == ([], ["1", "5", "7"])
    assert "process 1: " in found[0]["full"][0]


def config(directory: Path, name: str, *words: str):
    tier = (f"checkpoint.local_dir={directory / 'disk'}", "checkpoint.local_every=2")
    return tiny.config(directory / name, *tiny.from_imported(), *tier, *words)


class DiesError(Exception):
    """As a process does."""


def dies_before(last: int, directory: Path):
    """A step that fails when the one before has been saved on the local disk."""

    def around(step_fn: Step) -> Step:
        done = 0

        def step(state, batch):
            nonlocal done
            while done and done % 2 == 0 and not list(directory.glob(f"disk/*/process-0/{done}")):
                time.sleep(0.01)
            if done == last:
                raise DiesError
            done += 1
            return step_fn(state, batch)

        return step

    return around


def test_a_run_goes_on_from_its_local_disk_to_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    tiny.start(tiny.config(tmp_path / "whole", *tiny.from_imported()))
    asked = config(tmp_path, "run")
    with pytest.raises(DiesError):
        tiny.start(asked, around_step=dies_before(5, tmp_path))
    assert steps_on_disk(tmp_path / "run") == []
    resumed = open_run(asked, mesh=tiny.mesh()).resumed
    assert resumed is not None
    assert (resumed.step, resumed.part) == (4, 0)
    assert tiny.start(asked).step == tiny.STEPS
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(tmp_path / "whole")
    tiny.assert_same_state(find(tmp_path / "run"), find(tmp_path / "whole"))
    assert verify_run(tmp_path / "run").damages == ()
    assert list((tmp_path / "disk").iterdir()) == []  # a run that is done needs it no more


def test_a_run_that_has_gone_back_or_is_another_one_uses_no_parts(tmp_path: Path) -> None:
    asked = config(tmp_path, "run", "checkpoint.every=2")
    with pytest.raises(DiesError):
        tiny.start(asked, around_step=dies_before(5, tmp_path))
    shutil.copytree(tmp_path / "disk", tmp_path / "kept")
    rewind(tmp_path / "run", to=2, skip=None)
    resumed = open_run(asked, mesh=tiny.mesh()).resumed
    assert resumed is not None
    assert (resumed.step, resumed.part) == (2, None)
    assert tiny.start(asked).step == tiny.STEPS
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "kept").rename(tmp_path / "disk")
    shutil.rmtree(tmp_path / "run")
    assert open_run(asked, mesh=tiny.mesh()).resumed is None


def test_a_local_disk_that_cannot_be_written_costs_no_durable_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "disk").write_text("no directory")
    assert tiny.start(config(tmp_path, "run", "checkpoint.every=3")).step == tiny.STEPS
    assert steps_on_disk(tmp_path / "run") == [3, 6]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: checkpoint ")]
    assert [line.split()[2] for line in warnings] == ["2", "3", "4", "6"]
    for line in warnings:  # that of step 4 may be hindered by the save of step 3, which is a direct one
        assert "Not a directory" in line or "4 was not saved locally: another save is under way" in line
    assert max(tiny.metrics(tmp_path / "run", "checkpoint_failures").values()) >= 3


def tier(run: Path, start_step: int = -1) -> tuple[Path, LocalTier]:
    run.mkdir(exist_ok=True)
    parts = claim_parts(run, run.parent / "disk", tiny.mesh(1, 1))
    return parts, LocalTier(parts, start_step)


def test_the_latest_parts_are_kept_and_later_ones_dropped(tmp_path: Path) -> None:
    parts, saving = tier(tmp_path / "run")
    for step in range(1, 6):
        assert saving.save(random_state(tiny.mesh(1, 1)), meta(step)) == ""
        saving.wait(60)
    saving.close()
    assert steps_of(parts) == [3, 4, 5]
    (parts / "6.partial").mkdir()
    assert tier(tmp_path / "run", start_step=4)[0] == parts
    assert sorted(path.name for path in parts.iterdir()) == ["3", "4"]
    assert parts_of(tmp_path / "run", tmp_path / "disk", tiny.mesh(1, 1)) == parts
    assert parts_of(tmp_path / "run", tmp_path / "disk", tiny.mesh(1, 2)) is None


def test_no_local_save_is_begun_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, saving = tier(tmp_path / "run")
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: Usage(10**9, 0, 1000))
    assert saving.save(random_state(tiny.mesh(1, 1)), meta(1)).startswith("it takes ")
    monkeypatch.undo()
    saving.close()


def test_what_is_copied_is_what_was_written(tmp_path: Path) -> None:
    parts, saving = tier(tmp_path / "run")
    saving.save(random_state(tiny.mesh(1, 1)), meta(1))
    saving.close()
    flip(next((parts / "1" / "params").rglob("ocdbt.process_0/d/*")))
    place = tmp_path / "run" / "checkpoints"
    with pytest.raises(OSError, match="is not what it was copied from"):
        publish_copy(parts / "1", place / "1.partial", place / "1", alone())
    assert steps_on_disk(tmp_path / "run") == []
    with saver(tmp_path / "run", CheckpointConfig()):
        assert list(place.iterdir()) == []


def test_a_disk_needs_an_interval() -> None:
    with pytest.raises(UserError, match="give both local_dir and local_every"):
        tiny.config(Path("run"), "checkpoint.local_dir=/local")
