"""Recipes: what would run and why, what is kept, a run from text to a released model, and what may be uploaded."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard

from launch.push import on_the_hub, push
from launch.recipe import load_recipe
from launch.recipe_parts.process import Runner, locked
from tests.launch.recipe_files import environment, write_recipe
from tlite_jax.errors import UserError
from tlite_jax.recipe.graph import build, edges
from tlite_jax.recipe.identity import Hashes
from tlite_jax.recipe.state import load_state
from tlite_jax.release.result import load, save

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def recipe(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "recipe", *map(str, words)],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


def told(output: str) -> dict[str, str]:
    """Step -> what was said of it."""
    lines = [line.partition(": ") for line in output.splitlines()]
    return {name: said for name, _, said in lines if name in STEPS}


STEPS = ("import", "prepare1", "stage1", "stage2", "eval-held-out", "export-hf", "export-gguf", "gate", "card")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_the_release_is_whole_and_its_card_is_the_hubs(place: Path) -> None:
    release = place / "out" / "release"
    assert load(release).passed
    assert not (place / "out" / "release.partial").exists()
    text = (release / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["ru", "en"]
    assert card.data.base_model == "a-lab/tiny"
    names = {result.dataset_type for result in card.data.eval_results}
    assert "held-out text, language=ru" in names
    for title in ("## Data: stage1", "## What it gained and lost: stage2", "## Quantisations", "| Q8_0 |", "## Files"):
        assert title in text
    plot = release / "plots" / "loss-stage1.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert text.count("| steps | 4 |") == 2  # each stage came to its end


def decisions(file: Path) -> dict[str, str]:
    loaded = load_recipe(file)
    from tlite_jax.recipe.decide import Decider

    decider, state = Decider(loaded, Hashes(loaded.output / "none.json")), load_state(loaded.output / "recipe.json")
    found = {}
    arrows = build(loaded, file)
    behind = edges(arrows)
    for arrow in arrows:
        running = [name for name in behind[arrow.name] if found[name] != "done"]
        found[arrow.name] = decider.decide(arrow, state, running).why
    return found


def test_nothing_is_done_twice_and_what_changed_is_named(place: Path) -> None:
    file = place / "recipe.yaml"
    assert set(decisions(file).values()) == {"done"}
    values = json.loads(file.read_text())
    changed = place / "changed.yaml"
    changed.write_text(json.dumps({**values, "gate": {"windows": 3}}))
    found = decisions(changed)
    assert found["gate"] == "gate.windows has changed"
    assert found["card"] == "after gate"
    assert {found[name] for name in STEPS[:7]} == {"done"}
    stage = json.loads((place / "stage2.yaml").read_text())
    (place / "other.yaml").write_text(json.dumps({**stage, "seed": 7}))
    changed.write_text(json.dumps({**values, "stages": [values["stages"][0], {"config": str(place / "other.yaml")}]}))
    found = decisions(changed)
    assert "semantic hash" in found["stage2"]
    assert found["stage1"] == "done"
    assert found["export-hf"] == found["eval-held-out"] == "after stage2"


def test_a_changed_text_is_read_again(place: Path) -> None:
    text = place / "ru.jsonl"
    before = text.read_bytes()
    text.write_bytes(before + before.splitlines(keepends=True)[0])
    try:
        found = decisions(place / "recipe.yaml")
    finally:
        text.write_bytes(before)
    assert found["prepare1"] == f"{text} has changed"
    assert found["import"] == "done"
    assert found["stage1"] == "after prepare1"
    assert set(decisions(place / "recipe.yaml").values()) == {"done"}  # the time of change is not content


def test_a_harmed_output_is_found(place: Path) -> None:
    model = place / "out" / "release" / "hf" / "model.safetensors"
    before = model.read_bytes()
    model.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        found = decisions(place / "recipe.yaml")
    finally:
        model.write_bytes(before)
    assert found["export-hf"].endswith("release.partial/hf is not as it was made")
    assert found["stage2"] == found["export-gguf"] == "done"


def test_only_what_passed_and_has_not_changed_is_uploaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, sent = place / "out" / "release", {}

    def commit(self, repository, *, operations, **_):
        sent[repository] = {part.path_in_repo: Path(part.path_or_fileobj).read_bytes() for part in operations}
        return SimpleNamespace(commit_url="https://example.org/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repository, **_: SimpleNamespace(repo_id=repository))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    assert push(release, "a-lab/tiny-ru") == "https://example.org/commit/1"
    files = sent.pop("a-lab/tiny-ru")
    assert {"README.md", "config.json", "model.safetensors", "gguf/Tiny-Russian.Q8_0.gguf", "release.json"} <= set(
        files
    )
    released = {file.path.removeprefix("hf/"): file.sha256 for file in load(release).files}
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in released} == released
    model = release / "hf" / "model.safetensors"
    before = model.read_bytes()
    model.write_bytes(before + b"\0")
    with pytest.raises(UserError, match="has changed since"):
        push(release, "a-lab/tiny-ru")
    model.write_bytes(before)
    result = load(release)
    save(result.model_copy(update={"passed": False}), release)
    with pytest.raises(UserError, match="has not passed"):
        push(release, "a-lab/tiny-ru")
    save(result, release)
    assert not sent


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


def test_limits_of_the_gate_are_passed_on_and_are_of_exported_types(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "export": {"types": ["F16", "Q4_0"]}, "gate": {"most_kl": {"Q4_0": 0.5}}}))
    gate = next(arrow for arrow in build(load_recipe(file), file) if arrow.name == "gate")
    assert gate.command[-2:] == ("--most-kl", "Q4_0=0.5")
    file.write_text(json.dumps({**values, "export": {"types": ["F16"]}, "gate": {"most_kl": {"Q4_0": 0.5}}}))
    with pytest.raises(UserError, match="Q4_0 is none of export"):
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
