"""Jobs of three processes, one of which is slow: it must be named, with the cause, and nobody in a job without one.

    python -m tests.faults.slow data stopped throttled none --seed 1 --load 4

`data`: it waits for each batch, longer than a step takes. `stopped`: SIGSTOP and SIGCONT take turns, 60 ms each.
`throttled`: a control group gives it a fifth of the CPU time that it had; where none can be made (root, the cpu
controller of cgroup v2 or v1) it is stopped most of the time instead. `none`: 40 looks without a finding. `--load`
keeps as many processes busy beside the job. Faults of `tests.faults.lost` can be named, too: data and programs are
prepared once.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import lost

EVERY, LOOKS, SECONDS = 5, 40, 900.0
MEASURED, PERIOD = 2.0, 0.2  # seconds: how long a process is looked at, and in which its CPU time is limited
GROUPS, GROUP = Path("/sys/fs/cgroup"), "tlite-slow-"
CAUSES = {"data": "data wait", "stopped": "stood still", "throttled": "waits for a CPU|stood still", "none": ""}


@contextmanager
def _stopping(job: lost.Job, rank: int, stopped: float = 0.06, running: float = 0.06) -> Iterator[Callable[[], None]]:
    """What is called stops the process for a while and lets it go on for another."""

    def turn() -> None:
        for number, seconds in ((signal.SIGSTOP, stopped), (signal.SIGCONT, running)):
            job.ranks[rank].kill(number)
            time.sleep(seconds)

    yield turn


@contextmanager
def _throttled(job: lost.Job, rank: int) -> Iterator[Callable[[], None]]:
    """The process gets a fifth of what it has had, however busy the machine is."""
    pid = job.ranks[rank].pid
    before = _cpu_seconds(pid)
    time.sleep(MEASURED)
    share = (_cpu_seconds(pid) - before) / MEASURED / 5
    try:
        group = _make_group(share)
    except OSError:
        with _stopping(job, rank, PERIOD * (1 - share), PERIOD * share) as turn:
            yield turn
        return
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield partial(time.sleep, 0.05)
    finally:
        _remove(group)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _make_group(share: float) -> Path:
    """A control group that has this much of a core; those that a killed run of this has left are removed."""
    version_2 = (GROUPS / "cgroup.controllers").exists()
    parent = GROUPS if version_2 else GROUPS / "cpu"
    for left in parent.glob(f"{GROUP}*"):
        if not Path("/proc", left.name.removeprefix(GROUP)).exists():
            _remove(left)
    group = parent / f"{GROUP}{os.getpid()}"
    group.mkdir()
    period = int(PERIOD * 1e6)
    quota = max(1000, int(share * period))  # Linux gives no less
    files = {"cpu.max": f"{quota} {period}"} if version_2 else {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": quota}
    try:
        for name, value in files.items():
            (group / name).write_text(str(value))
    except OSError:
        group.rmdir()
        raise
    return group


def _remove(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()


@contextmanager
def _left_alone(job: lost.Job, rank: int) -> Iterator[Callable[[], None]]:
    yield partial(time.sleep, 0.05)


ACTS = {"data": _left_alone, "stopped": _stopping, "throttled": _throttled, "none": _left_alone}


def look(stage: lost.Stage, name: str, chance: np.random.Generator) -> dict[str, Any]:
    """One job; returns what was said of it, and when.

    Raises:
      AssertionError: the slow process was not named, or another one was.
    """
    rank = int(chance.integers(lost.PROCESSES))
    changes = {"watchdog": {"pace_every": EVERY}}
    job = stage.job({rank: lost.slow_data} if name == "data" else {}, **changes)
    file = stage.run / "stragglers.jsonl"
    last = LOOKS * EVERY if name == "none" else None
    try:
        job.wait_for(lambda: stage.has_trained(EVERY))
        began = time.monotonic()
        with ACTS[name](job, rank) as turn:

            def done() -> bool:
                turn()
                return stage.has_trained(last) if last else file.exists() and file.stat().st_size > 0

            job.wait_for(done, SECONDS)
        seconds = time.monotonic() - began
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        named = [line["process"] for line in found if line["slow"]]
        assert named == ([] if name == "none" else [rank]), f"{name} {rank}: {found}\n{job.said()}"
        assert all(re.search(CAUSES[name], line["text"]) for line in found), found
        said = [line["text"] for line in found]
        assert all(text in job.said() for text in said)
        return {"slow": name, "process": rank, "after": round(seconds, 1), "said": said}
    finally:
        job.end()


@contextmanager
def _load(count: int) -> Iterator[None]:
    """As many processes that compute, and end when this one does."""
    busy = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Looks at jobs."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # a time limit; what was begun is ended
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "kinds",
        nargs="*",
        default=list(ACTS),
        metavar="KIND",
        help=", ".join([*ACTS, *lost.FAULTS]),
    )
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=int, default=0, help="processes that compute beside each job")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tlite-slow-") as scratch, _load(arguments.load):
        stage = lost.Stage(Path(scratch))
        for number in range(arguments.count):
            for name in arguments.kinds:
                suffer_or_look = look if name in ACTS else lost.suffer
                found = suffer_or_look(stage, name, np.random.default_rng([arguments.seed, number]))
                print(json.dumps({"number": number, **found}), flush=True)


if __name__ == "__main__":
    main()
