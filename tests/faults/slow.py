"""Jobs of three processes, one of which is slow: it must be named, with the cause, and nobody in a job without one.

    python -m tests.faults.slow data stopped throttled none --seed 1

`data`: it waits for each batch, longer than a step takes. `stopped`: SIGSTOP and SIGCONT take turns, 60 ms each.
`throttled`: a control group gives it a tenth of a core (root, cgroup v2 or v1 with the cpu controller). `none`: 40
looks without a finding. Faults of `tests.faults.lost` can be named, too: data and programs are prepared once for all.
`throttled` is tried only where it is named: such a process is found sometimes, and late (docs/reliability.md).
"""

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import lost

EVERY, LOOKS, SECONDS = 5, 40, 180.0
GROUPS = Path("/sys/fs/cgroup")
CAUSES = {"data": "data wait", "stopped": "stood still", "throttled": "", "none": ""}


@contextmanager
def _stopping(job: lost.Job, rank: int) -> Iterator[Callable[[], None]]:
    """What is called stops the process for a while and lets it go on for as long."""

    def turn() -> None:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            job.ranks[rank].kill(number)
            time.sleep(0.06)

    yield turn


@contextmanager
def _throttled(job: lost.Job, rank: int) -> Iterator[Callable[[], None]]:
    """The process gets 10 ms of every 100."""
    version_2 = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if version_2 else GROUPS / "cpu") / f"tlite-{job.ranks[rank].pid}"
    group.mkdir()
    try:
        if version_2:
            (group / "cpu.max").write_text("10000 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text("10000")
        (group / "cgroup.procs").write_text(str(job.ranks[rank].pid))
        yield partial(time.sleep, 0.05)
    finally:
        (group.parent / "cgroup.procs").write_text(str(job.ranks[rank].pid))
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
        job.wait_for(lambda: stage.has_trained(1))
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
        assert all(CAUSES[name] in line["text"] for line in found), found
        said = [line["text"] for line in found]
        assert all(text in job.said() for text in said)
        return {"slow": name, "process": rank, "after": round(seconds, 1), "said": said}
    finally:
        job.end()


def main() -> None:
    """Looks at jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "kinds",
        nargs="*",
        default=[name for name in ACTS if name != "throttled"],
        metavar="KIND",
        help=", ".join([*ACTS, *lost.FAULTS]),
    )
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tlite-slow-") as scratch:
        stage = lost.Stage(Path(scratch))
        for number in range(arguments.count):
            for name in arguments.kinds:
                suffer_or_look = look if name in ACTS else lost.suffer
                found = suffer_or_look(stage, name, np.random.default_rng([arguments.seed, number]))
                print(json.dumps({"number": number, **found}), flush=True)


if __name__ == "__main__":
    main()
