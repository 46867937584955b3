"""Recipes: what is refused, what follows what, what holds a directory, and what may be uploaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.push import on_the_hub
from launch.recipe import load_recipe
from launch.recipe_parts.process import Runner, locked
from tests.launch.recipe_files import write_recipe
from tlite_jax.errors import UserError
from tlite_jax.recipe.graph import build, edges
from tlite_jax.recipe.identity import Hashes

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_a_link_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link"):
        on_the_hub(tmp_path / "release")


def test_stages_that_do_not_follow_one_another_are_refused(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "stages": values["stages"][::-1]}))
    with pytest.raises(UserError, match="stage 2 must start from stage 1"):
        build(load_recipe(file), file)
    file.write_text(json.dumps({**values, "stagse": []}))
    with pytest.raises(UserError, match="did you mean 'stages'"):
        load_recipe(file)


@pytest.mark.parametrize("name", ["smollm2_russian", "tlite_8b"])
def test_shipped_recipes_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    file = Path("configs/recipes") / f"{name}.yaml"
    behind = edges(build(load_recipe(file), file))
    assert behind["stage2"][-1] == "stage1"
    assert set(behind["gate"]) >= {"stage2", "export-hf", "export-gguf"}


def test_a_killed_recipe_leaves_a_lock_while_its_command_lives(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as lock:
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    with pytest.raises(UserError, match="another recipe works here"), locked(tmp_path / "lock"):
        pass
    orphan.communicate(b"\n")
    with locked(tmp_path / "lock"):
        pass


def test_a_failed_command_gives_its_status_and_no_result(tmp_path: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        runner = Runner(nowhere, nowhere)
        result = tmp_path / "result.json"
        assert runner.run(["verify", str(tmp_path / "absent"), "--json"], tmp_path / "log", result) == 2
    assert not result.exists()
    assert "does not exist" in (tmp_path / "log").read_text()


def test_digests_are_of_contents(tmp_path: Path) -> None:
    file, hashes = tmp_path / "a", Hashes(tmp_path / "hashes.json")
    file.write_text("one")
    first = hashes.of(file)
    os.utime(file, ns=(1, 1))
    assert hashes.of(file) == first
    file.write_text("two")
    assert hashes.of(file) != first
    hashes.save()
    again = Hashes(tmp_path / "hashes.json")
    status = file.stat()
    file.write_text("six")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert again.of(file) == hashes.of(file)  # the same stamp: not read
    assert Hashes(tmp_path / "hashes.json", fresh=True).of(file) != hashes.of(file)
