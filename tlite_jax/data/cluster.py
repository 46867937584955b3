"""A preparation on many machines: datatrove's executors run its two steps, tokenise shards and join them.

Every machine must see the input files and the buckets' directory under the same paths. What is done is told by shards
that are whole, never by the executors' marker files: those are not looked at.
"""

import hashlib
import os
import pickle
import secrets
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

import tlite_jax
from tlite_jax.data.preparation import SHARDS, Preparation
from tlite_jax.data.prepare import PrepareReport, find_finished, finish
from tlite_jax.data.shards import Encoders, encoder_for, tokenize_shard
from tlite_jax.errors import UserError

Progress = Callable[[str, int, int], None]

# Slurm's own default for the size of a job array is 1001.
MAX_TASKS = 1000


class TokenizeShards(PipelineStep):
    """Tokenises every world_size-th shard, beginning with number `rank`; one core a task."""

    type, name = "tlite_jax", "tokenise shards"

    def __init__(self, job: Path) -> None:
        super().__init__()
        self.job = str(job)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Does the task's shards, those that are done already aside."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
        preparation = _load(self.job)
        settings, encoders = preparation.settings(), Encoders()
        for shard in preparation.shards()[rank::world_size]:
            with self.track_time("shard"):
                tokenize_shard(shard, settings, encoder_for(shard, settings, encoders))
            self.stat_update("shards")
        return data


class JoinShards(PipelineStep):
    """Makes the buckets once all shards are tokenised; one task, with `num_workers` processes."""

    type, name = "tlite_jax", "join shards"

    def __init__(self, job: Path, num_workers: int, *, force: bool) -> None:
        super().__init__()
        self.job, self.num_workers, self.force = str(job), num_workers, force

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Joins; refuses when a shard is missing."""
        preparation = _load(self.job)
        todo = preparation.todo.model_copy(update={"num_workers": self.num_workers})
        finish(replace(preparation, todo=todo), None, force=self.force, run_shards=None)
        return data


@dataclass(frozen=True)
class Executor:
    """How the tasks are run.

    Attributes:
      tasks: how many; None is one a shard, MAX_TASKS at most.
      workers: how many at a time; None is all.
      logs: a directory that every machine sees.
      memory_gb: per core.
    """

    tasks: int | None
    workers: int | None
    logs: Path
    memory_gb: int

    def num_tasks(self, preparation: Preparation) -> int:
        """At least one shard for each."""
        return min(self.tasks or MAX_TASKS, len(preparation.shards()))


@dataclass(frozen=True)
class Slurm:
    """What sbatch is told besides: the join takes `join_cores` of one node; `options` go to both jobs."""

    partition: str
    time: str
    join_cores: int
    options: dict[str, str]


@dataclass(frozen=True)
class Submitted:
    """Slurm's numbers of the two jobs."""

    tokenize_job: str
    join_job: str
    shards: int
    tasks: int


def run_local(executor: Executor) -> Callable[[Preparation, Progress], None]:
    """Tokenises with datatrove's LocalPipelineExecutor."""

    def run(preparation: Preparation, progress: Progress) -> None:
        workers = executor.workers or preparation.num_workers
        tasks = executor.num_tasks(preparation)
        pipeline = [TokenizeShards(_save(preparation))]
        _run(
            LocalPipelineExecutor(
                pipeline, tasks=tasks, workers=workers, logging_dir=_logs(executor, "tokenise"), skip_completed=False
            ),
            progress,
            tasks,
        )

    return run


def run_ray(executor: Executor, address: str | None) -> Callable[[Preparation, Progress], None]:
    """Tokenises with datatrove's RayPipelineExecutor, on a cluster or, without an address, a Ray of this machine."""

    def run(preparation: Preparation, progress: Progress) -> None:
        import ray

        tasks = executor.num_tasks(preparation)
        pipeline = [TokenizeShards(_save(preparation))]
        if not ray.is_initialized():
            ray.init(address=address, runtime_env={"env_vars": _environment()}, log_to_driver=False)
        try:
            _run(
                RayPipelineExecutor(
                    pipeline,
                    tasks=tasks,
                    workers=executor.workers or tasks,
                    mem_per_cpu_gb=executor.memory_gb,
                    logging_dir=_logs(executor, "tokenise"),
                    skip_completed=False,
                ),
                progress,
                tasks,
            )
        finally:
            ray.shutdown()

    return run


def submit_slurm(
    preparation: Preparation, executor: Executor, slurm: Slurm, *, force: bool
) -> Submitted | PrepareReport:
    """Submits an array job that tokenises and a job that joins when it has ended, or finds that all is done.

    The join starts whatever became of the tasks, and says how many shards are missing; the same command again does
    those alone.
    """
    if not force and (existing := find_finished(preparation)) is not None:
        return existing
    if preparation.items is not None:
        preparation.items.build()
    job = _save(preparation)
    tasks = executor.num_tasks(preparation)
    common = {
        "time": slurm.time,
        "partition": slurm.partition,
        "mem_per_cpu_gb": executor.memory_gb,
        "qos": None,
        "env_command": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in _environment().items()),
        "sbatch_args": slurm.options,
        "skip_completed": False,
    }
    first = _SlurmExecutor(
        [TokenizeShards(job)],
        tasks=tasks,
        workers=executor.workers or -1,
        job_name="prepare-tokenise",
        logging_dir=_logs(executor, "tokenise"),
        **common,
    )
    second = _SlurmExecutor(
        [JoinShards(job, slurm.join_cores, force=force)],
        tasks=1,
        cpus_per_task=slurm.join_cores,
        job_name="prepare-join",
        logging_dir=_logs(executor, "join"),
        depends=first,
        run_on_dependency_fail=True,
        **common,
    )
    try:
        second.run()
    except Exception as error:  # sbatch is not there, or refuses
        reason = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        raise UserError(f"sbatch did not take the jobs: {reason[0] if reason else type(error).__name__}") from error
    return Submitted(str(first.job_id), str(second.job_id), len(preparation.shards()), tasks)


class _SlurmExecutor(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """Submits no third job: it would wait for ever behind a failed one."""


def _run(executor: PipelineExecutor, progress: Progress, tasks: int) -> None:
    from datatrove.utils.logging import logger

    logger.remove()  # each task writes a log of its own
    progress("tokenising", 0, tasks)
    try:
        executor.run()
    except UserError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"a task failed: {line}; see {executor.logging_dir.path}, then start again") from error
    progress("tokenising", tasks, tasks)


def _logs(executor: Executor, step: str) -> str:
    """A new directory for each run: marker files of another run mean nothing."""
    directory = executor.logs.absolute() / f"{step}-{secrets.token_hex(4)}"
    directory.mkdir(parents=True)
    return str(directory)


def _environment() -> dict[str, str]:
    """What makes a task find this program and its commands."""
    root = str(Path(tlite_jax.__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"PATH": programs, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _save(preparation: Preparation) -> Path:
    """Writes a preparation beside its shards, where every task finds it, under the hash of its content."""
    content = pickle.dumps((os.getcwd(), preparation))
    path = preparation.buckets.absolute() / SHARDS / f"job-{hashlib.sha256(content).hexdigest()}.pickle"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    temporary.write_bytes(content)
    temporary.rename(path)
    return path


def _load(path: str) -> Preparation:
    """Reads a preparation and goes to the directory that its relative paths begin in.

    Raises:
      UserError: the file is not the one that was written for this job; nothing of it is run.
    """
    content = Path(path).read_bytes()
    if Path(path).name != f"job-{hashlib.sha256(content).hexdigest()}.pickle":
        raise UserError(f"{path} is not what was written for this job: run prepare again")
    directory, preparation = pickle.loads(content)
    os.chdir(directory)
    assert isinstance(preparation, Preparation)
    return preparation
