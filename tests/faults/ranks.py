"""Jobs of four processes, one of which is told to make room: all must save the same step and say so.

    python -m tests.faults.ranks --count 50 --seed 1

A random process gets SIGTERM at a random moment after the first step. Every process must end with status 75 within the
grace period, with one whole checkpoint, of the last step that was logged.
"""

import argparse
import json
import shutil
import socket
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import typer

from tests import tiny
from tests.faults import report, runs
from tlite_jax.config_files import save_config

PROCESSES, GRACE_SECONDS, START_SECONDS = 4, 30.0, 240.0
MANY_STEPS = 5000


class Job:
    """`launch train` in several forked processes of one device each."""

    def __init__(self, config: Path, scratch: Path, processes: int = PROCESSES) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
        self.ranks = [
            runs.Child(lambda rank=rank: _train(config, coordinator, processes, rank), scratch / f"rank{rank}.log")
            for rank in range(processes)
        ]

    def wait_for_step(self, metrics: Path) -> None:
        """Returns when a step has been logged.

        Raises:
          AssertionError: a process has ended, or none is logged in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline, self.said()
            assert all(rank.poll() is None for rank in self.ranks), self.said()
            time.sleep(0.01)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses; None for a process that is there still."""
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in self.ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [rank.poll() for rank in self.ranks]

    def end(self) -> None:
        """Kills what is left."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def said(self) -> str:
        """What the processes have written."""
        return "\n".join(f"{rank.log.name}: {rank.log.read_text()[-3000:]}" for rank in self.ranks)


def _train(config: Path, coordinator: str, processes: int, rank: int) -> None:
    from launch.train import main

    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    status = 0
    try:
        main(config, coordinator=coordinator, num_processes=processes, process_id=rank)
    except typer.Exit as end:
        status = end.exit_code
    jax.distributed.shutdown()  # as Python's end does in a process that was not forked: process 0 goes last
    raise SystemExit(status)


def preempt(data: Path, scratch: Path, chance: np.random.Generator) -> dict[str, float]:
    """One job, one SIGTERM; returns which process got it, the step saved and how long all took to end."""
    output = scratch / "run"
    config = runs.config(data, output, scratch / "cache", train={"steps": MANY_STEPS, "batch_size": tiny.BATCH_SIZE})
    mixture = config.data.mixture.model_copy(update={"tokens": MANY_STEPS * tiny.BATCH_SIZE * tiny.LENGTH})
    checkpoint = config.checkpoint.model_copy(update={"every": MANY_STEPS})
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"mixture": mixture}), "checkpoint": checkpoint}
    )
    save_config(config, scratch / "run.yaml")
    rank = int(chance.integers(PROCESSES))
    job = Job(scratch / "run.yaml", scratch)
    try:
        job.wait_for_step(output / "metrics.jsonl")
        time.sleep(float(chance.random()))
        job.ranks[rank].kill(15)
        asked = time.monotonic()
        statuses = job.wait(GRACE_SECONDS)
        seconds = time.monotonic() - asked
        assert statuses == [75] * PROCESSES, f"SIGTERM to process {rank}: {statuses}\n{job.said()}"
    finally:
        job.end()
    (step,) = (int(entry.name) for entry in (output / "checkpoints").iterdir())
    logged = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, step + 1)), f"step {step} was saved, these were logged: {logged}"
    shutil.rmtree(output)
    return {"rank": rank, "step": step, "seconds": round(seconds, 2)}


def main() -> None:
    """Preempts jobs and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began, slowest = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="tlite-ranks-") as scratch:
        data = runs.make_data(Path(scratch) / "data")
        for number in range(arguments.count):
            found = preempt(data, Path(scratch), np.random.default_rng([arguments.seed, number]))
            slowest = max(slowest, found["seconds"])
            report.tell(worst=found["seconds"], limit=GRACE_SECONDS)
            print(json.dumps({"number": number, **found}), flush=True)
    print(
        f"{arguments.count} of {arguments.count} jobs of {PROCESSES} processes saved one step and ended with 75, the "
        f"slowest in {slowest:.1f} s; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
