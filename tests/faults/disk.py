"""Runs on a disk that fills up while they train: is anything lost but the checkpoints that had no room?

    python -m tests.faults.disk --count 50 --seed 1

The output of each run lies on a tmpfs (mounted here, so root is needed). For some of its steps a ballast file leaves
less room than a checkpoint takes, often none. Saves must fail and be counted, training must go on to the bits of a run
that nothing happened to, and what is on the disk then must be whole checkpoints and nothing else.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import report, runs
from tlite_jax.checkpoint import steps_on_disk
from tlite_jax.checkpoint.verify import verify_run
from tlite_jax.telemetry.metrics import read_jsonl

_DISK_BYTES = 16 << 20


class Ballast:
    """A file that leaves as much room on its disk as is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def leave(self, room: int) -> None:
        """Makes `room` bytes free, as far as other files do not have them."""
        self.remove()
        size = shutil.disk_usage(self._path.parent).free - room
        if size > 0:
            with self._path.open("wb") as file, contextlib.suppress(OSError):  # a save may take some at the same time
                os.posix_fallocate(file.fileno(), 0, size)

    def remove(self) -> None:
        """Gives all of it back."""
        self._path.unlink(missing_ok=True)


def why_not() -> str | None:
    """What this process lacks for mounting a tmpfs, or None."""
    try:
        with tempfile.TemporaryDirectory() as directory, small_disk(Path(directory)):
            return None
    except (OSError, subprocess.CalledProcessError):
        return "mounting a tmpfs needs root"


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A directory with a tmpfs on it, unmounted on the way out."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def sweep(scratch: Path, disk: Path, count: int, seed: int, note: Callable[[dict[str, Any]], None]) -> int:
    """Trains `count` runs on the disk; returns how many saves came to nothing.

    Raises:
      AssertionError: a run was lost, ended with other bits, or left something behind.
    """
    data = runs.make_data(scratch / "data")
    expected = runs.undisturbed(data, scratch)
    save_bytes = sum(path.stat().st_blocks * 512 for path in (scratch / "undisturbed/checkpoints/16").rglob("*"))
    failures = 0
    for number in range(count):
        chance = np.random.default_rng([seed, number])
        failed = _run(data, scratch, disk / "run", expected, save_bytes, chance)
        note({"number": number, "seed": seed, "failed": failed})
        failures += failed
    return failures


def _run(
    data: Path, scratch: Path, output: Path, expected: dict[str, Any], save_bytes: int, chance: np.random.Generator
) -> int:
    """One run; returns how many of its saves came to nothing."""
    first = int(chance.integers(1, 8))
    last = int(chance.integers(first + 4, 14))
    rooms = {step: int(max(0.0, chance.uniform(-0.4, 0.9)) * save_bytes) for step in range(first, last + 1)}
    ballast = Ballast(output.parent / "ballast")
    checkpoint = {"every": runs.SAVE_EVERY, "keep_latest": runs.STEPS}
    telemetry = {"console": False, "tensorboard": True}
    config = runs.config(data, output, scratch / "cache", checkpoint=checkpoint, telemetry=telemetry)
    child = runs.Child(
        lambda: runs.train_to_the_end(config, around_step=_filling(ballast, rooms)), scratch / "disk.log"
    )
    status, log = child.wait(), child.log.read_text()
    assert status == 0, f"a run is lost; room by step: {rooms}\n{log}"
    found = json.loads(output.with_suffix(".json").read_text())
    wrong = [name for name, value in expected.items() if found[name] != value]
    assert not wrong, f"a run ended with other {wrong}; room by step: {rooms}"
    failed = log.count("was not saved: ")
    counted = max((line.get("checkpoint_failures", 0) for line in read_jsonl(output / "metrics.jsonl")), default=0)
    whole, there = steps_on_disk(output), sorted(os.listdir(output / "checkpoints"))
    assert failed, f"no save failed; room by step: {rooms}"
    assert counted == failed, f"{failed} saves failed, {counted} were counted"
    assert len(whole) == runs.STEPS // runs.SAVE_EVERY - failed, f"{failed} saves failed, there are {whole}"
    assert there == sorted(map(str, whole)), f"left behind: {there}"
    assert not verify_run(output).damages, str(verify_run(output).damages[0])
    shutil.rmtree(output)
    output.with_suffix(".json").unlink()
    return failed


def _filling(ballast: Ballast, rooms: dict[int, int]) -> Callable[[Callable], Callable]:
    """Puts before every step the room there is for a save after it."""

    def around(step: Callable) -> Callable:
        number = 0

        def filled(*arguments: Any) -> Any:
            nonlocal number
            number += 1
            if number in rooms:
                ballast.leave(rooms[number])
            else:
                ballast.remove()
            return step(*arguments)

        return filled

    return around


def main() -> None:
    """Runs the sweep and prints its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if (reason := why_not()) is not None:
        parser.error(reason)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="tlite-disk-") as scratch,
        tempfile.TemporaryDirectory() as directory,
        small_disk(Path(directory)) as disk,
    ):
        failures = sweep(
            Path(scratch), disk, arguments.count, arguments.seed, lambda line: print(json.dumps(line), flush=True)
        )
    seconds = time.monotonic() - began
    report.tell(count=arguments.count, note=f"{failures} saves had no room")
    print(f"{arguments.count} runs on a disk that was full at times, {seconds:.0f} s: {failures} saves came to nothing")
    print(
        "and were counted; every run ended with the same bits, all else was saved and intact, nothing was left behind"
    )


if __name__ == "__main__":
    main()
