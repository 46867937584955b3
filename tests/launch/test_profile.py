"""`train --profile-steps`: the trace is there, and its parts have the names of the code's."""

import re
from pathlib import Path

import pytest

from launch import train as command
from launch.train_parts.profile import Profile
from tests import tiny
from tlite_jax.errors import UserError
from tlite_jax.train import loop
from tlite_jax.train.run import open_run

SCOPES = ("embedding", "layers", "layers_backward", "attention", "mlp", "loss", "gather", "reduce_scatter", "optimizer")


def test_a_trace_of_the_steps_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "make_step", tiny.make_quick_step)
    run = open_run(tiny.config(tmp_path / "run", *tiny.from_imported()), mesh=tiny.mesh())
    profile = Profile("3:5", tmp_path / "run" / "profile")
    starts: list[int] = []
    real = profile.before_step

    def noted(step, state):
        before = profile._traces
        real(step, state)
        if profile._traces != before:
            starts.append(step)

    monkeypatch.setattr(profile, "before_step", noted)
    assert command.train_run(run, profile=profile).step == tiny.STEPS
    assert starts == [3, 5]
    assert capsys.readouterr().err == f"profile: {tmp_path}/run/profile\n"
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    contents = trace.read_bytes()
    # As part of an operation's path, forward (jvp(mlp)) and backward (transpose(jvp(mlp))) too.
    missing = [scope for scope in SCOPES if not re.search(rf"[/(]{scope}[/)]".encode(), contents)]
    assert not missing
    # It makes no difference to what is learned, nor to where the run goes on.
    assert tiny.start(tiny.config(tmp_path / "run", *tiny.from_imported())).step == tiny.STEPS


def test_steps_that_never_come_are_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Profile("3:5", tmp_path / "profile") as profile:
        profile.before_step(1, None)
        profile.before_step(7, None)
    assert capsys.readouterr().err == "no step from 3 to 4 was computed: nothing to profile\n"
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", ["10", "0:3", "5:5", "7:5", "a:b", "-1:3"])
def test_other_words_are_refused(steps: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not FIRST:END"):
        Profile(steps, tmp_path)
