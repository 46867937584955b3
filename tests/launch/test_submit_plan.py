"""What the plan says of a run about to be submitted."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.submit_parts import planned
from tests.launch.in_process import Ended
from tests.launch.submitting import tool


def test_the_plan_has_a_say(submit: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuses(*words: Any) -> str:
        asked.append(words)
        raise planned.DoesNotFitError("does not fit: 90 of 79 GiB; fits with execution.remat=full")

    monkeypatch.setattr(planned, "plan", refuses)
    tool(tmp_path, "sbatch", "echo 41")
    ended = submit("--cluster", "slurm", "--hardware", "h100")
    assert (ended.status, ended.out) == (1, "")
    assert "fits with execution.remat=full; not submitted (--force does it all the same)" in ended.err
    assert asked[0][1:4] == ("h100", 12, 2)
    assert not (tmp_path / "runs").exists()
    ended = submit("--cluster", "slurm", "--hardware", "h100", "--force")
    assert (ended.status, ended.out.splitlines()[0][:12]) == (0, "submitted 41")
    assert "submitted all the same" in ended.err


def test_the_plan_is_asked_for_the_nodes_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`plan` itself has its tests; here its command line and its answers are what matters."""
    from launch.submit import HARDWARE
    from tlite_jax.errors import UserError

    answer = subprocess.CompletedProcess([], 1, "", "compiling\nerror: does not fit: 90 of 79 GiB\n")
    seen: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        described = command[command.index("--hardware") + 1]
        seen.append((yaml.safe_load(Path(described).read_text())["devices_per_node"], command[-1]))
        return answer

    monkeypatch.setattr(planned.subprocess, "run", run)
    with pytest.raises(planned.DoesNotFitError, match="does not fit: 90"):
        planned.plan(tmp_path / "run.yaml", "a100-80gb", 12, 4, HARDWARE)
    assert seen == [(4, "12")]
    answer.returncode, answer.stderr = 2, "error: 'plan' needs the compiler\n"
    with pytest.raises(UserError, match=r"plan: 'plan' needs the compiler; mend it, or pass --no-plan"):
        planned.plan(tmp_path / "run.yaml", "a100-80gb", 12, 4, HARDWARE)
