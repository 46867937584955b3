"""A batch script for Slurm, and its submission. Whatever came from a user reaches the shell quoted."""

import re
import shlex
import shutil
import string
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.submit_parts.environment import TEMPLATES, Processes, checked, checked_path
from tlite_jax.errors import UserError

_WORD, _WORD_SAID = r"[A-Za-z0-9_][A-Za-z0-9_.,:@+-]*", "a plain name"
# minutes, minutes:seconds, hours:minutes:seconds, and days-hours of each, as sbatch takes them
_TIME = r"(?:[0-9]{1,5}-)?[0-9]{1,9}(?::[0-9]{1,9}){0,2}"
# Options of sbatch that the script has already, and those of `submit` that say otherwise.
_OWN = {
    "nodes": "--nodes",
    "ntasks-per-node": "--processes-per-node",
    "gpus-per-node": "--gpus-per-node",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "time": "--time",
    "job-name": "--name",
    "signal": "--grace",
    "output": "--jobs-directory",
    "requeue": "--restart-limit",
    "no-requeue": "--restart-limit 0",
    "ntasks": None,
    "open-mode": None,
    "array": None,
    "wrap": None,
}
WAIT_SECONDS = 300  # after the first process ends, until Slurm ends the others: they may still be saving


class _Template(string.Template):
    """A shell script has its own use for dollars."""

    delimiter = "@"


@dataclass(frozen=True)
class Slurm:
    """How a job is asked for.

    Attributes:
      partition, account, qos, time: as for sbatch; None for the cluster's default.
      extra: further options of sbatch, `--name=value` each.
      exclusive: whole nodes.
      chain: jobs, each of which goes on where the one before was ended by the time limit.
      restart_limit: of one job.
      grace_seconds: before the time limit, to save in.
      container: "pyxis" or "apptainer", or None.
      image, mounts: of the container.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    extra: Sequence[str] = ()
    exclusive: bool = True
    chain: int = 1
    restart_limit: int = 100
    grace_seconds: int = 300
    container: str | None = None
    image: str | None = None
    mounts: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """Where a job lives.

    Attributes:
      job_directory: of the script, the config's snapshot and the logs.
      working_directory: that the config's relative paths are relative to.
      repository: where `launch` is imported from; None when it is installed.
      python: that runs it, on the nodes.
    """

    job_directory: Path
    working_directory: Path
    repository: Path | None
    python: str


def script(name: str, processes: Processes, slurm: Slurm, place: Place) -> str:
    """The batch script.

    Raises:
      UserError: a value that Slurm or a #SBATCH line cannot take.
    """
    for option, value in (("--python", place.python), ("--image", slurm.image)):
        if value is not None:
            checked(option, value, r"[^\x00-\x1f\x7f]+", "one line, not empty")
    template = (TEMPLATES / "job.sh").read_text(encoding="utf-8")
    chain = ""
    if slurm.chain > 1:
        rule = _Template((TEMPLATES / "chain.sh").read_text(encoding="utf-8"))
        chain = rule.substitute(least_seconds=2 * slurm.grace_seconds)
    return _Template(template).substitute(
        sbatch="\n".join(f"#SBATCH {line}" for line in _sbatch(name, processes, slurm, place)),
        job_directory=shlex.quote(str(place.job_directory)),
        environment="\n".join(_exports(processes, place)),
        working_directory=shlex.quote(str(place.working_directory)),
        srun=" ".join(shlex.quote(word) for word in _srun(processes, slurm, place)),
        command=" ".join(shlex.quote(word) for word in _command(slurm, place)),
        chain=chain,
        restart_limit=slurm.restart_limit,
    )


def submit(file: Path, chain: int) -> list[str]:
    """Hands the script to sbatch, as often as the chain is long; the jobs' numbers.

    Raises:
      UserError: no sbatch here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on this machine; run `sbatch {file}` where it is, or pass --dry-run")
    jobs: list[str] = []
    for _ in range(chain):
        dependency = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        ended = subprocess.run(
            ["sbatch", "--parsable", *dependency, str(file)], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            said = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
            before = f"; submitted before: {', '.join(jobs)}" if jobs else ""
            raise UserError(f"sbatch refuses {file}: {said}{before}")
        jobs.append(ended.stdout.strip().split(";")[0])
    return jobs


def seconds(time: str) -> int:
    """A time limit as sbatch reads it."""
    days, _, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if days:
        hours, minutes, second = [*numbers, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + second
    if len(numbers) == 3:
        return numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def _sbatch(name: str, processes: Processes, slurm: Slurm, place: Place) -> list[str]:
    if slurm.time is not None:
        checked("--time", slurm.time, _TIME, "a time limit such as 12:00:00 or 2-00:00:00")
        if 0 < seconds(slurm.time) <= slurm.grace_seconds:
            raise UserError(
                f"--time {slurm.time} leaves no time to train before --grace {slurm.grace_seconds} seconds begin"
            )
    logs = checked_path("--jobs-directory", place.job_directory / "logs" / "%j.log").replace("%", "%%")
    lines = [
        f"--job-name={name}",
        f"--nodes={processes.nodes}",
        f"--ntasks-per-node={processes.per_node}",
        *([f"--gpus-per-node={processes.gpus_per_node}"] if processes.gpus_per_node else []),
        *(["--exclusive", "--mem=0"] if slurm.exclusive else []),
        *(
            f"--{option}={checked(f'--{option}', value, _WORD, _WORD_SAID)}"
            for option, value in (("partition", slurm.partition), ("account", slurm.account), ("qos", slurm.qos))
            if value is not None
        ),
        *([f"--time={slurm.time}"] if slurm.time is not None else []),
        f"--signal=USR1@{slurm.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        f'--output="{logs.removesuffix("%%j.log")}%j.log"',
    ]
    return lines + [_further(option) for option in slurm.extra]


def _further(option: str) -> str:
    checked("--sbatch", option, r"--[a-z][a-z-]*(=[^\"'\\\x00-\x1f\x7f]+)?", "--name or --name=value, without quotes")
    name = option.removeprefix("--").partition("=")[0]
    if name in _OWN:
        mend = f"give {_OWN[name]} instead" if _OWN[name] else "leave it out"
        raise UserError(f"--sbatch={option} contradicts the script; {mend}")
    return option


def _exports(processes: Processes, place: Place) -> list[str]:
    lines = []
    for variable in processes.variables:
        lines += [f"# {variable.reason}", f"export {variable.name}={shlex.quote(variable.value)}"]
    if place.repository is not None:
        lines += [
            "# where `launch` is",
            f"export PYTHONPATH={shlex.quote(str(place.repository))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]
    return lines


def _srun(processes: Processes, slurm: Slurm, place: Place) -> list[str]:
    logs = str(place.job_directory / "logs").replace("%", "%%")
    words = [
        f"--nodes={processes.nodes}",
        f"--ntasks-per-node={processes.per_node}",
        "--mpi=none",
        "--cpu-bind=none",
        # One that ends early must not have the others killed while they save; one that is lost, they notice themselves.
        "--kill-on-bad-exit=0",
        f"--wait={WAIT_SECONDS}",
        "--open-mode=append",
        f"--output={logs}/%j-%t.log",
    ]
    if slurm.container == "pyxis":
        words += [f"--container-image={slurm.image}", f"--container-workdir={place.working_directory}"]
        words += [f"--container-mounts={','.join(_mounts(slurm, place))}"]
    return words


def _command(slurm: Slurm, place: Place) -> list[str]:
    words = [place.python, "-m", "launch", "train", str(place.job_directory / "config.yaml")]
    if slurm.container == "apptainer":
        assert slurm.image is not None
        binds = [word for mount in _mounts(slurm, place) for word in ("--bind", mount)]
        words = ["apptainer", "exec", "--nv", "--pwd", str(place.working_directory), *binds, slurm.image, *words]
    return words


def _mounts(slurm: Slurm, place: Place) -> list[str]:
    """What the container sees of the node: the user's mounts, and what the script itself names."""
    own = [place.working_directory, place.job_directory, *([place.repository] if place.repository else [])]
    found = [*slurm.mounts, *(f"{path}:{path}" for path in own)]
    for mount in found:
        if not re.fullmatch(r"[^,:\s]+(:[^,:\s]+){0,2}", mount):
            raise UserError(f"--mount {mount!r} is not of the form SOURCE:TARGET, without blanks and commas")
    return list(dict.fromkeys(found))
