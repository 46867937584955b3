"""Recipes: what would run and why, what is kept, and a run from text to a released model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from launch.recipe import load_recipe
from launch.recipe_parts.process import Runner, locked
from tests.launch.recipe_files import REPOSITORY, STEPS, write_recipe
from tlite_jax.errors import UserError
from tlite_jax.recipe.graph import build, edges
from tlite_jax.recipe.identity import Hashes
from tlite_jax.recipe.state import load_state
from tlite_jax.release.result import load


def test_the_release_is_whole_and_its_card_is_the_hubs(finished: Path) -> None:
    release = finished / "out" / "release"
    assert load(release).passed
    assert not (finished / "out" / "release.partial").exists()
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


def test_nothing_is_done_twice_and_what_changed_is_named(finished: Path) -> None:
    file = finished / "recipe.yaml"
    assert set(decisions(file).values()) == {"done"}
    values = json.loads(file.read_text())
    changed = finished / "changed.yaml"
    changed.write_text(json.dumps({**values, "gate": {"windows": 3}}))
    found = decisions(changed)
    assert found["gate"] == "gate.windows has changed"
    assert found["card"] == "after gate"
    assert {found[name] for name in STEPS[:7]} == {"done"}
    stage = json.loads((finished / "stage2.yaml").read_text())
    (finished / "other.yaml").write_text(json.dumps({**stage, "seed": 7}))
    stages = [values["stages"][0], {"config": str(finished / "other.yaml")}]
    changed.write_text(json.dumps({**values, "stages": stages}))
    found = decisions(changed)
    assert "semantic hash" in found["stage2"]
    assert found["stage1"] == "done"
    assert found["export-hf"] == found["eval-held-out"] == "after stage2"


def test_a_changed_text_is_read_again(finished: Path) -> None:
    text = finished / "ru.jsonl"
    before = text.read_bytes()
    text.write_bytes(before + before.splitlines(keepends=True)[0])
    try:
        found = decisions(finished / "recipe.yaml")
    finally:
        text.write_bytes(before)
    assert found["prepare1"] == f"{text} has changed"
    assert found["import"] == "done"
    assert found["stage1"] == "after prepare1"
    assert set(decisions(finished / "recipe.yaml").values()) == {"done"}  # the time of change is not content


def test_a_harmed_output_is_found(finished: Path) -> None:
    model = finished / "out" / "release" / "hf" / "model.safetensors"
    before = model.read_bytes()
    model.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        found = decisions(finished / "recipe.yaml")
    finally:
        model.write_bytes(before)
    assert found["export-hf"].endswith("release.partial/hf is not as it was made")
    assert found["stage2"] == found["export-gguf"] == "done"


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
