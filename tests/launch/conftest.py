"""A recipe's run from text to a release, made once for all tests that look at one; and the command `submit`."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.in_process import Ended, run_command
from tests.launch.recipe_files import finish, recipe, told, write_recipe
from tlite_jax.recipe.state import load_state


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose recipe was stopped in stage 1, gone on with, and is released."""
    directory = tmp_path_factory.mktemp("recipe")
    file = write_recipe(directory)
    process = recipe(file)
    deadline = time.monotonic() + 200
    while not (directory / "out" / "logs" / "stage1.log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "stage1: stopped by SIGTERM" in finish(process, 75)
    assert load_state(directory / "out" / "recipe.json").arrows["stage1"].state == "started"
    assert not (directory / "out" / "release").exists()
    said = told(finish(recipe(file)))
    assert said["import"] == said["prepare1"] == "done"
    assert said["stage1"] == "goes on: interrupted"
    return directory


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    """Calls `submit` on the tests' run for 12 nodes of 2 GPUs, without planning, in this process."""
    tiny.write_config(tmp_path / "run.yaml", tmp_path / "runs" / "stage1", train={"batch_size": 24})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()

    def invoke(*words: str) -> Ended:
        command = ["submit", tmp_path / "run.yaml", "--nodes", "12", "--gpus-per-node", "2"]
        return run_command(monkeypatch, capsys, *command, *words)

    return invoke
