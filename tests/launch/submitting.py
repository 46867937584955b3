"""What the tests of `submit` share: stand-ins for the cluster's commands, and a job script run as slurmd would."""

import stat
import subprocess
from pathlib import Path

KUBERNETES = ("--cluster", "kubernetes", "--no-plan", "--image", "registry.example/team/tlite:1", "output=stage1")
KUBERNETES = (*KUBERNETES, "data.buckets=buckets", "data.tokenizer=tokenizer")


def tool(directory: Path, name: str, text: str) -> None:
    """A command that stands in for the cluster's."""
    file = directory / "bin" / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def sbatch_lines(script: str) -> list[str]:
    """The options that a script has for sbatch."""
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


SRUN = """
printf '%s\\n' "$@" > srun.words
env > srun.environment
exit "$(cat status)"
"""


def run_script(
    script: Path, directory: Path, status: int, restarts: int = 0, job: str = "JobState=RUNNING EndTime=Unknown"
) -> int:
    """Runs a job script as slurmd would, with an srun that ends so; scontrol notes what it is asked."""
    (directory / "status").write_text(str(status))
    tool(directory, "srun", f"cd {directory}\n{SRUN}")
    case = f"case $1 in requeue) echo $@ > {directory}/scontrol.words ;; *) echo 'JobId=7 {job} NumNodes=12' ;; esac"
    tool(directory, "scontrol", case)
    environment = {
        "PATH": f"{directory}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-12]",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, check=False).returncode
