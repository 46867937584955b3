"""Jobs of three processes in which one is killed, stopped, stuck, slow, in error, or never comes.

    python -m tests.faults.lost killed coordinator stopped stuck --count 20 --seed 1

The others must end by themselves, with status 76, and soon: within 15 seconds where a process is gone, within the
watchdog's limit and 15 seconds where one is stuck or absent. Prints a line for each job: what was done to which
process, when each of the others ended, and how it said why.
"""

import argparse
import json
import math
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tests import tiny
from tests.faults import report, runs
from tlite_jax.config_files import save_config

PROCESSES, GONE_SECONDS, START_SECONDS = 3, 15.0, 240.0
MANY_STEPS = 20_000
JOIN_SECONDS, STEP_FLOOR = 4.0, 4.0
STUCK_AT, SLOW_FROM, JUDGED_FROM = 14, 3, 3  # batches; steps after that are what the watchdog knows
RESTART = 76

Patch = Callable[[], None]


class Fault(NamedTuple):
    """What is done to one process of a job.

    Attributes:
      first: whether process 0, the coordinator, is the one; None: any may be, drawn by chance.
      comes: whether the process is started at all.
      inside: done in the process, before it trains.
      sent: a signal, at a random moment after the first step.
      seconds: from the fault, or from the start of a job with an absent process, until all others must have ended.
      says: what the log of some process must have, as a format of `rank`.
      own: status that the process itself may end with.
    """

    first: bool | None
    comes: bool = True
    inside: Patch | None = None
    sent: signal.Signals | None = None
    seconds: float = GONE_SECONDS
    says: str = "start it again"
    own: tuple[int | None, ...] = (None,)


def _stuck() -> None:
    _change_batches(lambda number: threading.Event().wait() if number == STUCK_AT else None)


def _in_error() -> None:
    def fail(number: int) -> None:
        if number == STUCK_AT:
            raise OSError(5, "Input/output error", "buckets")

    _change_batches(fail)


def slow_data() -> None:
    """Waits for each batch longer than a step takes, however busy the machine is."""
    returned, longest = [0.0], 0.1

    def wait(number: int) -> None:
        nonlocal longest
        if number > SLOW_FROM:
            longest = max(longest, time.monotonic() - returned[0])
            time.sleep(min(2.0, 1.5 * longest))
        returned[0] = time.monotonic()

    _change_batches(wait)


def _change_batches(before: Callable[[int], Any]) -> None:
    """Calls a function of each batch's number before the training loop gets it."""
    from tlite_jax.train import loop

    real = loop.batches

    def batches(*words: Any, **named: Any) -> Iterator:
        for number, batch in enumerate(real(*words, **named)):
            before(number)
            yield batch

    loop.batches = batches


FAULTS = {
    "killed": Fault(False, sent=signal.SIGKILL, own=(-9,)),
    "coordinator": Fault(True, sent=signal.SIGKILL, own=(-9,)),
    "stopped": Fault(None, sent=signal.SIGSTOP),
    "stuck": Fault(
        None, inside=_stuck, seconds=STEP_FLOOR + GONE_SECONDS, says="process {rank} .* is in data_wait", own=(RESTART,)
    ),
    "error": Fault(None, inside=_in_error, says="Input/output error", own=(1,)),
    "absent": Fault(False, comes=False, seconds=JOIN_SECONDS + GONE_SECONDS, says="process {rank} has not come"),
    "no_coordinator": Fault(True, comes=False, seconds=JOIN_SECONDS + GONE_SECONDS, says="process 0 was not reached"),
}


class Job:
    """`launch train` in forked processes of one device each.

    Args:
      config: the run.
      logs: where their outputs go.
      inside: what is done to which process first.
      absent: processes that are not started.
      processes: in the job.
      coordinator: "host:port"; None is a free port of this machine.
    """

    def __init__(
        self,
        config: Path,
        logs: Path,
        inside: dict[int, Patch],
        absent: tuple[int, ...] = (),
        *,
        processes: int = PROCESSES,
        coordinator: str | None = None,
    ) -> None:
        words = ["train", str(config), "--coordinator", coordinator or _free_port()]
        words += ["--num-processes", str(processes), "--process-id"]
        self.began = time.monotonic()
        self.ranks = {
            rank: runs.Child(
                lambda rank=rank: _launch([*words, str(rank)], inside.get(rank)),  # type: ignore[misc]
                logs / f"rank{rank}.log",
            )
            for rank in range(processes)
            if rank not in absent
        }

    def wait_for(self, done: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Returns when something is so. Raises AssertionError: a process has ended, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.said()
            assert all(child.poll() is None for child in self.ranks.values()), self.said()
            time.sleep(0.01)

    def wait(self, ranks: list[int], deadline: float) -> dict[int, tuple[int | None, float]]:
        """Each one's status (None: it is there still) and when it ended, seconds after the job began."""
        found: dict[int, tuple[int | None, float]] = {}
        while len(found) < len(ranks) and time.monotonic() < deadline:
            for rank in ranks:
                if rank not in found and self.ranks[rank].poll() is not None:
                    found[rank] = self.ranks[rank].poll(), time.monotonic() - self.began
            time.sleep(0.01)
        return {rank: found.get(rank, (None, time.monotonic() - self.began)) for rank in ranks}

    def end(self) -> None:
        """Kills what is left."""
        for child in self.ranks.values():
            child.kill()
            child.wait()

    def said(self) -> str:
        """What the processes have written."""
        return "\n".join(f"{child.log.name}: {child.log.read_text()[-6000:]}" for child in self.ranks.values())


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def _launch(words: list[str], inside: Patch | None) -> None:
    from launch.__main__ import main

    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if inside is not None:
        inside()
    sys.argv = ["launch", *words]
    main()


class Stage:
    """Where jobs run: data and compiled programs, made once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._data = runs.make_data(scratch / "data")
        self.run = scratch / "run"

    def config(self, **changes: Any) -> Path:
        """Writes the config of a run that does not end by itself."""
        train = {"steps": MANY_STEPS, "batch_size": tiny.BATCH_SIZE}
        watchdog = {"step_floor": STEP_FLOOR, "join": JOIN_SECONDS, "pace_every": 0}
        config = runs.config(
            self._data,
            self.run,
            self._scratch / "cache",
            **{"train": train, "checkpoint": {"every": MANY_STEPS}, "watchdog": watchdog, **changes},
        )
        mixture = config.data.mixture.model_copy(update={"tokens": MANY_STEPS * tiny.BATCH_SIZE * tiny.LENGTH})
        config = config.model_copy(update={"data": config.data.model_copy(update={"mixture": mixture})})
        save_config(config, self._scratch / "run.yaml")
        return self._scratch / "run.yaml"

    def job(
        self,
        inside: dict[int, Patch],
        absent: tuple[int, ...] = (),
        *,
        processes: int = PROCESSES,
        coordinator: str | None = None,
        **changes: Any,
    ) -> Job:
        """Starts one, on a directory of its own; `changes` are sections of its config."""
        shutil.rmtree(self.run, ignore_errors=True)
        config = self.config(**changes)
        return Job(config, self._scratch, inside, absent, processes=processes, coordinator=coordinator)

    def has_trained(self, step: int) -> bool:
        """Whether a step has been logged."""
        metrics = self.run / "metrics.jsonl"
        return metrics.exists() and step in tiny.metrics(self.run)


def suffer(stage: Stage, name: str, chance: np.random.Generator) -> dict[str, Any]:
    """One job, one fault; returns what came of it.

    Raises:
      AssertionError: the others did not end, too late, with another status, or without saying why.
    """
    fault = FAULTS[name]
    rank = int(chance.integers(PROCESSES) if fault.first is None else 0 if fault.first else 1 + chance.integers(2))
    job = stage.job({rank: fault.inside} if fault.inside else {}, () if fault.comes else (rank,))
    try:
        since = job.began
        if fault.comes:
            job.wait_for(lambda: stage.has_trained(STUCK_AT - 2 if fault.inside else 2))
            time.sleep(float(chance.random()) if fault.sent else 0.0)
            since = time.monotonic()
        if fault.sent is not None:
            job.ranks[rank].kill(fault.sent)
        others = [number for number in range(PROCESSES) if number != rank]
        ended = job.wait(others, since + fault.seconds)
        own = None
        if fault.comes and fault.own != (None,):  # process 0 goes last: it serves the others' board
            own = job.wait([rank], since + fault.seconds)[rank][0]
        problems = [f"process {one} has {status}" for one, (status, _) in ended.items() if status != RESTART]
        if own not in fault.own:
            problems.append(f"the process itself has {own}")
        said = job.said()
        seen = _seen(stage, said, rank) if name == "stuck" else {}
        if not re.search(fault.says.format(rank=rank), said):
            problems.append(f"nobody says {fault.says.format(rank=rank)!r}")
        assert not problems, f"{name} {rank}: {'; '.join(problems)}\n{said}"
    finally:
        job.end()
    seconds = {number: round(at - (since - job.began), 2) for number, (_, at) in ended.items()}
    report.tell(name, worst=max(seconds.values()), limit=fault.seconds)
    return {"fault": name, "process": rank, "others_ended_after": seconds, **seen, "said": why(job, others)}


def _seen(stage: Stage, said: str, rank: int) -> dict[str, float]:
    """When the watchdog has found the stuck process, and 3 times the 99th percentile of its steps with the floor."""
    steps = [seconds for step, seconds in tiny.metrics(stage.run, "step_seconds").items() if step > JUDGED_FROM]
    p99, found = (
        float(np.percentile(steps, 99)),
        re.search(rf"process {rank} .* has been in data_wait for (.*) s,", said),
    )
    after, limit = float(found[1]) if found else math.inf, 3 * p99 + STEP_FLOOR
    report.tell("stuck, found", worst=after, limit=limit, note=f"3 x p99 of a step ({p99:.2f} s) + {STEP_FLOOR:g} s")
    return {"found_after": after, "p99_step": round(p99, 3), "found_limit": round(limit, 2)}


def why(job: Job, ranks: list[int]) -> dict[int, str]:
    """The line in which each process says why it ends."""
    found = {}
    for rank in ranks:
        lines = [line for line in job.ranks[rank].log.read_text().splitlines() if line.startswith("error:")]
        found[rank] = lines[0][:200] if lines else ""
    return found


def main() -> None:
    """Tries the faults and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    slowest: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="tlite-lost-") as scratch:
        stage = Stage(Path(scratch))
        for number in range(arguments.count):
            for name in arguments.faults:
                found = suffer(stage, name, np.random.default_rng([arguments.seed, number]))
                slowest[name] = max(slowest.get(name, 0.0), *found["others_ended_after"].values())
                print(json.dumps({"number": number, **found}), flush=True)
    for name, seconds in slowest.items():
        print(f"{name}: {arguments.count} of {arguments.count} jobs ended with 76, the slowest after {seconds:.1f} s")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
