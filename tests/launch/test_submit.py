"""`submit` for Slurm: scripts that bash and Slurm read as meant, whatever the names."""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.submit_parts import slurm
from tests import tiny
from tests.launch.in_process import Ended
from tests.launch.submitting import run_script, sbatch_lines, tool
from tlite_jax.config_files import load_config

HOSTILE = "/data/it's $(touch pwned) `touch pwned`; touch pwned & \\ \"x"


def test_a_dry_run_prints_a_script_and_writes_nothing(submit: Callable[..., Ended], tmp_path: Path) -> None:
    before = tiny.contents(tmp_path)
    ended = submit("--cluster", "slurm", "--no-plan", "--dry-run", "--time", "12:00:00", "--partition", "gpu")
    assert ended.status == 0, ended.err
    assert tiny.contents(tmp_path) == before
    lines = sbatch_lines(ended.out)
    wanted = ["--nodes=12", "--gpus-per-node=2", "--ntasks-per-node=1", "--time=12:00:00", "--signal=USR1@300"]
    assert {*wanted, "--requeue", "--open-mode=append", "--partition=gpu", "--job-name=runs-stage1"} <= {*lines}
    assert subprocess.run(["bash", "-n"], input=ended.out, text=True, check=False).returncode == 0
    assert "export NCCL_DEBUG=WARN" in ended.out
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in ended.out
    hopper = submit("--cluster", "slurm", "--no-plan", "--dry-run", "--hardware", "h100", "--env", "NCCL_DEBUG=INFO")
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in hopper.out
    assert "export NCCL_DEBUG=INFO" in hopper.out
    assert "NCCL_DEBUG=WARN" not in hopper.out


def test_names_from_a_config_never_reach_a_shell_unquoted(
    submit: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script runs in a directory with a hostile name; what it starts sees every word as it was."""
    place = tmp_path / "it is $(touch pwned) `touch pwned` & #%j"
    place.mkdir()
    monkeypatch.chdir(place)
    tool(tmp_path, "sbatch", f'echo "$@" > {tmp_path}/sbatch.words; echo 41')
    words = ["--env", f"VALUE={HOSTILE}", "--python", HOSTILE, "output=a $(touch pwned)/b;c"]
    ended = submit("--cluster", "slurm", "--no-plan", *words)
    assert ended.status == 0, ended.err
    directory = place / "a $(touch pwned)" / "b;c.jobs" / "1"
    assert ended.out.splitlines()[0] == f"submitted 41: {directory}/job.sh"
    assert load_config(directory / "config.yaml").output == Path("a $(touch pwned)/b;c")
    assert sbatch_lines((directory / "job.sh").read_text())[0] == "--job-name=a-touch-pwned--b-c"
    assert run_script(directory / "job.sh", tmp_path, 0) == 0
    started = (tmp_path / "srun.words").read_text().splitlines()
    assert started[-5:] == [HOSTILE, "-m", "launch", "train", f"{directory}/config.yaml"]
    assert f"--output={directory}/logs/%j-%t.log".replace("#%j", "#%%j") in started
    assert f"\nVALUE={HOSTILE}\n" in (tmp_path / "srun.environment").read_text()
    assert not list(tmp_path.rglob("pwned"))
    output = next(line for line in sbatch_lines((directory / "job.sh").read_text()) if line.startswith("--output="))
    assert shlex.split(output) == [f"--output={directory}/logs/%j.log".replace("#%j", "#%%j")]


@pytest.mark.parametrize(
    ("status", "restarts", "asked", "finished"),
    [(0, 0, False, "0"), (75, 3, True, None), (76, 3, True, None), (137, 0, True, None), (75, 100, False, None)]
    + [(status, 0, False, str(status)) for status in (1, 2, 77, 78, 130)],
)
def test_what_each_exit_status_leads_to(
    status: int, restarts: int, asked: bool, finished: str | None, submit: Callable[..., Ended], tmp_path: Path
) -> None:
    tool(tmp_path, "sbatch", "echo 41")
    assert submit("--cluster", "slurm", "--no-plan").status == 0
    directory = tmp_path / "runs" / "stage1.jobs" / "1"
    assert run_script(directory / "job.sh", tmp_path, status, restarts) == (0 if asked else status)
    assert (tmp_path / "scontrol.words").exists() == asked
    if asked:
        assert (tmp_path / "scontrol.words").read_text() == "requeue 7\n"
    history = (directory / "history.log").read_text()
    assert history.endswith(f"job 7, start {restarts + 1}, on n[1-12]: status {status}\n")
    assert ((directory / "finished").read_text().strip() if finished else None) == finished
    if finished:  # the next of a chain starts nothing
        (tmp_path / "srun.words").unlink()
        assert run_script(directory / "job.sh", tmp_path, 0) == status
        assert not (tmp_path / "srun.words").exists()


def test_a_cancelled_job_is_not_requeued(submit: Callable[..., Ended], tmp_path: Path) -> None:
    tool(tmp_path, "sbatch", "echo 41")
    assert submit("--cluster", "slurm", "--no-plan").status == 0
    script = tmp_path / "runs" / "stage1.jobs" / "1" / "job.sh"
    assert run_script(script, tmp_path, 75, job="JobState=COMPLETING EndTime=Unknown") == 75
    assert not (tmp_path / "scontrol.words").exists()


def test_a_chain_hands_over_at_the_end_of_its_time(submit: Callable[..., Ended], tmp_path: Path) -> None:
    tool(tmp_path, "sbatch", f'echo "$@" >> {tmp_path}/sbatch.words; wc -l < {tmp_path}/sbatch.words')
    ended = submit("--cluster", "slurm", "--no-plan", "--chain", "3", "--json")
    script = tmp_path / "runs" / "stage1.jobs" / "1" / "job.sh"
    submitted = {"cluster": "slurm", "directory": str(script.parent), "submitted": ["1", "2", "3"]}
    assert json.loads(ended.out) == submitted
    dependencies = [line.split() for line in (tmp_path / "sbatch.words").read_text().splitlines()]
    assert [words[1:-1] for words in dependencies] == [[], ["--dependency=afterany:1"], ["--dependency=afterany:2"]]
    assert (
        run_script(script, tmp_path, 75, job="JobState=RUNNING EndTime=2020-01-01T00:00:00") == 75
    )  # long past: the next one goes on
    assert not (tmp_path / "scontrol.words").exists()
    assert run_script(script, tmp_path, 75, job="JobState=RUNNING EndTime=2099-01-01T00:00:00") == 0  # preempted early
    assert (tmp_path / "scontrol.words").exists()


def test_containers_of_slurm(submit: Callable[..., Ended]) -> None:
    words = ["--cluster", "slurm", "--no-plan", "--dry-run", "--image", "/images/t.sif", "--mount", "/scratch:/scratch"]
    ended = submit(*words, "--container", "apptainer")
    assert "apptainer exec --nv --pwd" in ended.out
    assert "--bind /scratch:/scratch" in ended.out
    assert "/images/t.sif python -m launch train" in ended.out
    ended = submit(*words, "--container", "pyxis")
    assert "--container-image=/images/t.sif" in ended.out
    assert "--container-mounts=/scratch:/scratch," in ended.out


def test_time_limits_are_read_as_sbatch_does() -> None:
    times = {"90": 5400, "90:30": 5430, "1:30:00": 5400, "1-12": 129600, "1-00:30": 88200, "2-00:00:00": 172800}
    assert {time: slurm.seconds(time) for time in times} == times
