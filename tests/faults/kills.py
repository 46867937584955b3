"""The kill sweep: SIGKILL at random moments, most of them aimed at a save; after each the run is gone on with.

    python -m tests.faults.kills --count 300 --seed 1 --log kills.jsonl [--resume] [--local]

Whenever a run reaches its end, every loss, the last state's bits and the rows read must equal those of a run that
nothing happened to, and every checkpoint left must be as it was sealed. The log has a line for every kill and every
finished run; with --resume the kills in it count, so that a thousand can be gathered in several sittings. The moment of
kill N depends on the seed and N alone. With --local the run saves on a local disk, too, and there more often.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.faults import report, runs
from tlite_jax.checkpoint.seal import PARTIAL
from tlite_jax.checkpoint.verify import verify_run

_POLL_SECONDS = 0.0005

_Key = tuple[str, int]


class Kill(NamedTuple):
    """Where a kill was sent, and what it found.

    Attributes:
      number, aim, delay: which; at any "moment" of a start, at a "save" or its "seal"; seconds after that began.
      in_save, in_seal: a checkpoint was half written; Orbax had finished it, and it was not sealed and named (or it was
        being copied from the local disk).
      steps: the last whole step on disk at the start, and the one afterwards.
      local: the one afterwards is on the local disk alone.
    """

    number: int
    aim: str
    delay: float
    in_save: bool
    in_seal: bool
    steps: tuple[int, int]
    local: bool


class Sweep:
    """Kills one run after another.

    Args:
      scratch: an empty directory.
      seed: of the moments.
      note: takes a line of the log.
      local: save on a local disk, too.
    """

    def __init__(
        self, scratch: Path, seed: int, note: Callable[[dict[str, Any]], None], *, local: bool = False
    ) -> None:
        self._scratch, self._seed, self._note = scratch, seed, note
        self._changes: dict[str, Any] = {}
        self._num_saves = 8 if local else 2  # of a start, one of which is aimed at
        if local:
            tier = {"local_dir": str(scratch / "disk"), "local_every": 1}
            self._changes = {"checkpoint": {"every": 4, "keep_latest": 3, **tier}}
        self._data = runs.make_data(scratch / "data")
        began = time.monotonic()
        self._expected = runs.undisturbed(self._data, scratch)
        self._start_seconds = time.monotonic() - began
        self._seconds = {"save": 0.1, "seal": 0.03}
        self.kills: list[Kill] = []
        self.finished = 0

    def run(self, count: int, first: int = 0) -> None:
        """Sends kills `first` to `count`, then lets the last run finish.

        Raises:
          AssertionError: a run was lost, or ended with other bits.
        """
        number = first
        while number < count:
            output = self._scratch / f"run{number}"
            while number < count and self._kill(number, output):
                number += 1
            self._finish(output)

    def _kill(self, number: int, output: Path) -> bool:
        """One start that is killed; False when it was over before that."""
        chance = np.random.default_rng([self._seed, number])
        aim = str(chance.choice(["save", "seal", "moment"], p=[0.4, 0.2, 0.4]))
        nth_save, part = int(chance.integers(1, self._num_saves + 1)), float(chance.random())
        before, left = _last_step(output), set(half_written(output))
        child = self._start(output)
        began = time.monotonic()
        delay = part * self._seconds.get(aim, self._start_seconds)
        left = self._wait(child, output, left, aim, nth_save if aim != "moment" else 0, delay)
        child.kill()
        status = child.wait()
        if status == 0:
            self._start_seconds = 0.8 * self._start_seconds + 0.2 * (time.monotonic() - began)
            return False
        assert status == -9, f"kill {number}: the start before it failed with {status}:\n{child.log.read_text()}"
        after = _last_step(output)
        assert after >= before, f"kill {number}: step {before} was there, now the newest is {after}"
        now = half_written(output)
        new = [name for key, name in now.items() if key not in left]
        sealing = any(name.endswith(PARTIAL) for name in new)
        is_local = after > max(_steps(output / "checkpoints"), default=0)
        kill = Kill(number, aim, round(delay, 4), bool(new), sealing, (before, after), is_local)
        self.kills.append(kill)
        self._note({"kill": kill.number, "seed": self._seed, **kill._asdict()})
        return True

    def _wait(
        self, child: runs.Child, output: Path, left: set[_Key], aim: str, nth_save: int, delay: float
    ) -> set[_Key]:
        """Until so many seconds after the nth save or seal of this start began (0: after the start), or its end.

        Returns:
          What is half written still since the start before, of `left`.
        """
        seen: set[_Key] = set()
        deadline = time.monotonic() + delay if not nth_save else None
        while child.poll() is None and (deadline is None or time.monotonic() < deadline):
            now = half_written(output)
            left = left & now.keys()
            seen |= {key for key, name in now.items() if aim == "save" or name.endswith(PARTIAL)} - left
            if deadline is None and len(seen) >= nth_save:
                deadline = time.monotonic() + delay
            time.sleep(_POLL_SECONDS)
        return left

    def _start(self, output: Path) -> runs.Child:
        config = runs.config(self._data, output, self._scratch / "cache", **self._changes)
        return runs.Child(lambda: runs.train_to_the_end(config), output.with_suffix(".log"))

    def _finish(self, output: Path) -> None:
        result = output.with_suffix(".json")
        if not result.exists():
            child = self._start(output)
            assert child.wait() == 0, f"{output.name} is lost:\n{child.log.read_text()}"
        found = json.loads(result.read_text())
        wrong = [name for name, value in self._expected.items() if found[name] != value]
        assert not wrong, f"{output.name} ended with other {wrong}"
        assert not half_written(output), f"{output.name} ended with {sorted(half_written(output).values())}"
        assert not verify_run(output).damages, f"{output.name}: {verify_run(output).damages[0]}"
        self.finished += 1
        self._note({"run": output.name, "seed": self._seed, "equal": sorted(found)})
        assert not list((self._scratch / "disk").glob("*")), f"{output.name} has left something on the local disk"
        shutil.rmtree(output)
        result.unlink()


def half_written(run: Path) -> dict[_Key, str]:
    """Names of checkpoints that are begun and not whole, by step and inode: Orbax's own name changes on the way.

    A checkpoint that is whole has a number for a name. One that is being deleted was whole.
    """
    return {
        (entry.name.partition(".")[0], entry.inode()): entry.name
        for place in _places(run)
        for entry in _entries(place)
        if not entry.name.isdecimal() and not entry.name.endswith(".deleting")
    }


def _last_step(run: Path) -> int:
    return max((step for place in _places(run) for step in _steps(place)), default=0)


def _places(run: Path) -> list[Path]:
    """Where checkpoints of a run lie: its directory and the local disk."""
    return [run / "checkpoints", *run.parent.glob(f"disk/{run.name}-*/process-0")]


def _steps(place: Path) -> list[int]:
    return [int(entry.name) for entry in _entries(place) if entry.name.isdecimal()]


def _entries(place: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(place))
    except FileNotFoundError:
        return []


def read_log(path: Path) -> tuple[int, int, int, int, int]:
    """Of a log that may not exist: kills, those in a save, those in a seal, runs finished, the first unused number."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kills = [line for line in lines if "kill" in line]
    used = max((line["number"] for line in kills), default=-1) + 1
    in_save, in_seal = (sum(line[name] for line in kills) for name in ("in_save", "in_seal"))
    return len(kills), in_save, in_seal, sum("run" in line for line in lines), used


def main() -> None:
    """Runs a sweep and prints its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="kills, those in the log included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("kills.jsonl"))
    parser.add_argument("--resume", action="store_true", help="go on with the log instead of refusing it")
    parser.add_argument("--local", action="store_true", help="save on a local disk, too")
    arguments = parser.parse_args()
    if arguments.log.exists() and not arguments.resume:
        parser.error(f"{arguments.log} is there: give --resume to go on with it, or another --log")
    *_, first = read_log(arguments.log)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tlite-kills-") as scratch, arguments.log.open("a") as log:

        def note(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()

        Sweep(Path(scratch), arguments.seed, note, local=arguments.local).run(arguments.count, first)
    kills, in_save, in_seal, finished, _ = read_log(arguments.log)
    minutes = (time.monotonic() - began) / 60
    report.tell(count=kills, note=f"{in_save} in a save, {in_seal} of these in a seal; {finished} runs finished, equal")
    print(f"{kills} kills, {in_save} with a checkpoint half written, {in_seal} of these while it was sealed;")
    print(f"{finished} runs finished, all equal bit for bit; 0 lost; seed {arguments.seed}, {minutes:.0f} minutes for")
    print(f"{kills - first} kills of this sitting")


if __name__ == "__main__":
    main()
