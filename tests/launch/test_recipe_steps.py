"""Recipes step by step: interrupted at each, changed, run from one, one alone, done by hand; commands are stand-ins."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch.recipe import load_recipe
from tests.launch.in_process import run_command
from tests.launch.recipe_files import STEPS, told, write_recipe
from tests.launch.recorded_runner import RecordedRunner
from tlite_jax.recipe.graph import build
from tlite_jax.recipe.state import load_state

MADE = ("out", "base", "buckets", "stage1", "stage2")


class Called(NamedTuple):
    """How a recipe ended: its status, what it printed, and the steps whose commands ran."""

    status: int
    said: str
    ran: list[str]


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe and all that it starts from."""
    directory = tmp_path_factory.mktemp("kitchen")
    write_recipe(directory)
    return directory


@pytest.fixture
def fresh(kitchen: Path) -> Iterator[Path]:
    """The recipe, of which nothing is made; what a test changes of its inputs is put back."""
    before = {path: path.read_bytes() for path in kitchen.rglob("*") if path.is_file()}
    yield kitchen / "recipe.yaml"
    for place in kitchen.iterdir():
        if place.name.partition(".before-")[0] in MADE:
            shutil.rmtree(place)
    for path, content in before.items():
        if path.read_bytes() != content:
            path.write_bytes(content)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Calls `python -m launch recipe FILE` in this process."""

    def invoke(file: Path, *words: str, stop_at: str | None = None, fail_at: str | None = None) -> Called:
        arrows = {arrow.command: arrow for arrow in build(load_recipe(file), file)}
        values = {"arrows": arrows, "stop_at": stop_at, "fail_at": fail_at, "ran": []}
        runner = type("Runner", (RecordedRunner,), values)
        monkeypatch.setattr("launch.recipe.Runner", runner)
        ended = run_command(monkeypatch, capsys, "recipe", file, *words)
        return Called(ended.status, ended.out + ended.err, runner.ran)

    return invoke


def edited(file: Path, **sections: Any) -> Path:
    """Another recipe in the same directory, some of whose sections differ."""
    other = file.with_name("edited.yaml")
    other.write_text(json.dumps({**json.loads(file.read_text()), **sections}))
    return other


def test_interrupted_at_any_step_it_goes_on_there(fresh: Path, call: Callable[..., Called]) -> None:
    release = fresh.parent / "out" / "release"
    for number, step in enumerate(STEPS):
        for place in MADE:
            shutil.rmtree(fresh.parent / place, ignore_errors=True)
        stopped = call(fresh, stop_at=step)
        assert (stopped.status, stopped.ran) == (75, list(STEPS[: number + 1]))
        assert f"{step}: stopped by SIGTERM; run again to go on" in stopped.said
        assert not release.exists()
        again = call(fresh)
        assert (again.status, again.ran) == (0, list(STEPS[number:]))
        assert told(again.said) == {
            **dict.fromkeys(STEPS[:number], "done"),
            step: "goes on: interrupted",
            **dict.fromkeys(STEPS[number + 1 :], "runs: not made yet"),
        }
        assert (release / "README.md").exists()
        assert not list(release.rglob("*.partial"))
        assert not release.with_name("release.partial").exists()
        assert call(fresh).ran == []


def test_a_step_that_fails_releases_nothing(fresh: Path, call: Callable[..., Called]) -> None:
    failed = call(fresh, fail_at="gate")
    assert (failed.status, failed.ran[-1]) == (1, "gate")
    assert "gate: ended with 1;" in failed.said
    assert not (fresh.parent / "out" / "release").exists()
    assert call(fresh).ran == ["gate", "card"]


def test_what_changed_runs_again_with_all_that_hangs_on_it_and_nothing_else(
    fresh: Path, call: Callable[..., Called]
) -> None:
    assert call(fresh).ran == list(STEPS)
    here, released = fresh.parent, fresh.parent / "out" / "release"
    recipe = json.loads(fresh.read_text())
    for sections, steps in (
        ({"card": {**recipe["card"], "description": "Another."}}, ("card",)),
        ({"card": {**recipe["card"], "license": "mit"}}, ("export-gguf", "gate", "card")),
        ({"gate": {"windows": 3}}, ("gate", "card")),
        ({"evaluate": [{"name": "held-out", "max_tokens": 7}]}, ("eval-held-out", "card")),
        ({"export": {"types": ["F16"]}}, ("export-gguf", "gate", "card")),
        ({"export": {"types": ["F16"], "dtype": "float16"}}, ("export-hf", "gate", "card")),
    ):
        recipe |= sections
        changed = edited(fresh, **recipe)
        dry = call(changed, "--dry-run", "--json")
        planned = [step["step"] for step in json.loads(dry.said) if step["action"] != "skip"]
        assert (tuple(planned), dry.ran) == (steps, [])
        assert tuple(call(changed).ran) == steps
        assert (released / "release.json").exists()
    for change, steps in (
        (lambda: _set(here / "stage2.yaml", telemetry={"console": True}), ()),
        (lambda: _set(here / "stage2.yaml", seed=9), STEPS[3:]),
        (lambda: _set(here / "stage2.yaml", train={"steps": 5, "batch_size": 4}), STEPS[3:]),
        (lambda: (here / "ru.jsonl").write_bytes((here / "ru.jsonl").read_bytes() + b'{"text": "x"}\n'), STEPS[1:]),
        (lambda: _set(here / "source" / "generation_config.json", changed=1), STEPS),
    ):
        change()
        assert tuple(call(edited(fresh, **recipe)).ran) == tuple(steps)
        assert (released / "release.json").exists()
    assert len(list(here.glob("stage2.before-*"))) == 4  # a run that has to be made anew is never deleted
    assert len(list(here.glob("base.before-*"))) == 1


def _set(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_longer_stage_goes_on_where_its_schedule_allows(fresh: Path, call: Callable[..., Called]) -> None:
    stage = fresh.parent / "stage2.yaml"
    _set(stage, schedule={"name": "constant_with_warmup", "warmup_steps": 2})
    call(fresh)
    _set(stage, train={"steps": 6, "batch_size": 4})
    longer = call(fresh)
    assert told(longer.said)["stage2"] == f"goes on: {stage} (train.steps) has changed"
    assert longer.ran[0] == "stage2"
    assert not list(fresh.parent.glob("stage2.before-*"))
    _set(stage, train={"steps": 3, "batch_size": 4})
    assert told(call(fresh).said)["stage2"].startswith("runs again")
    assert len(list(fresh.parent.glob("stage2.before-*"))) == 1
    _forget_steps(fresh.parent / "out" / "recipe.json")
    assert call(fresh).ran == []


def _forget_steps(file: Path) -> None:
    """As an earlier version wrote it."""
    state = json.loads(file.read_text())
    for arrow in state["arrows"].values():
        arrow["inputs"] = {key: value for key, value in arrow["inputs"].items() if "train.steps" not in key}
    file.write_text(json.dumps(state))


def test_from_a_step_all_behind_it_runs(fresh: Path, call: Callable[..., Called]) -> None:
    call(fresh)
    assert call(fresh, "--from", "export-gguf").ran == ["export-gguf", "gate", "card"]
    again = call(fresh, "--from", "stage2")
    assert tuple(again.ran) == STEPS[3:]
    assert told(again.said)["stage2"] == "runs again: asked for"
    assert len(list(fresh.parent.glob("stage2.before-*"))) == 1
    assert (fresh.parent / "out" / "release" / "README.md").exists()
    assert call(fresh).ran == []


def test_one_step_alone(fresh: Path, call: Callable[..., Called]) -> None:
    early = call(fresh, "--only", "gate")
    assert (early.status, early.ran) == (2, [])
    assert "is absent; make it first, by an earlier step or by hand" in early.said
    assert call(fresh, "--only", "import").ran == ["import"]
    assert call(fresh).ran == list(STEPS[1:])
    release = fresh.parent / "out" / "release"
    assert call(fresh, "--only", "eval-held-out").ran == ["eval-held-out"]
    assert release.exists()
    card = call(fresh, "--only", "card")
    assert card.ran == ["card"]
    assert "release.partial: not released yet; the recipe without --only does that" in card.said
    assert not release.exists()
    assert call(fresh).ran == []
    assert release.exists()


def test_verify_reads_what_looks_unchanged(fresh: Path, call: Callable[..., Called]) -> None:
    call(fresh)
    model = fresh.parent / "out" / "release" / "hf" / "model"
    status, content = model.stat(), model.read_text()
    model.write_text(content[:-1] + "?")
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert call(fresh).ran == []
    assert "export-hf: runs again" in call(fresh, "--dry-run", "--verify").said
    assert model.read_text() != content
    assert call(fresh, "--verify").ran == ["export-hf"]  # to the same bytes, which the gate has read
    assert model.read_text() == content


def test_what_was_trained_by_hand_is_taken_as_done(finished: Path, tmp_path: Path, call: Callable[..., Called]) -> None:
    """Its import and its stages, real ones, by a recipe that knows nothing of them."""
    values = json.loads((finished / "recipe.yaml").read_text())
    values |= {"output": str(tmp_path / "out"), "base": {"source": f"{finished}/out/../source"}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values))
    dry = told(call(file, "--dry-run").said)
    assert dry["prepare1"].startswith("runs: not made yet")
    for step in ("import", "stage1", "stage2"):
        assert dry[step].startswith("taken as done: done by hand")
        taken = call(file, "--only", step)
        assert (taken.status, taken.ran) == (0, [])
        assert load_state(tmp_path / "out" / "recipe.json").arrows[step].adopted
    stage = json.loads((finished / "stage2.yaml").read_text())
    for change in ({"seed": 7}, {"train": {"steps": 5, "batch_size": 4}}):
        (tmp_path / "stage2.yaml").write_text(json.dumps({**stage, **change}))
        file.write_text(json.dumps({**values, "stages": [values["stages"][0], {"config": f"{tmp_path}/stage2.yaml"}]}))
        (tmp_path / "out" / "recipe.json").unlink(missing_ok=True)
        dry = told(call(file, "--dry-run").said)
        assert dry["stage1"].startswith("taken as done")
        assert dry["stage2"].startswith("runs: after prepare1")
    file.write_text(json.dumps({**values, "base": {"source": "a-lab/another"}}))
    assert told(call(file, "--dry-run").said)["import"].startswith("runs: not made yet")


def test_bad_values_are_refused_and_name_the_good_ones(
    fresh: Path, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, message in {
        ("--from", "stage3"): f"--from stage3: no such step; choose from {', '.join(STEPS)}",
        ("--only", "Gate"): f"--only Gate: no such step; choose from {', '.join(STEPS)}",
        ("--from", "gate", "--only", "gate"): "--from and --only are two choices",
        ("--push-to-hub", "tiny"): "'tiny' is no repository of the hub; give ORG/NAME",
        ("--push-to-hub", "a/b", "--only", "card"): "--push-to-hub uploads a whole release: leave out --only",
        ("--private",): "--private is of the repository that --push-to-hub ORG/NAME makes",
        ("--push-to-hub", "a/b"): "there is no token",
    }.items():
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        refused = call(fresh, *words)
        assert (refused.status, refused.ran) == (2, [])
        assert message in refused.said
    assert not (fresh.parent / "out").exists()
