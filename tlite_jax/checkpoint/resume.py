"""From which checkpoint a run goes on: the newest one that is intact, on the local disks or in the run's directory."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tlite_jax.checkpoint.parts import steps_of
from tlite_jax.checkpoint.peers import new_talk
from tlite_jax.checkpoint.reader import array_names, chunks_of_part
from tlite_jax.checkpoint.state import StateReading
from tlite_jax.checkpoint.stored import Checkpoint, find, find_part, steps_on_disk
from tlite_jax.checkpoint.verify import damages_of, others
from tlite_jax.errors import UserError
from tlite_jax.verification import Damage

DAMAGED = ".damaged"


class Newest(NamedTuple):
    """What a run goes on from.

    Attributes:
      checkpoint: None: nothing was saved.
      reading: of its state, which was read while it was verified; None when it was not.
    """

    checkpoint: Checkpoint | None
    reading: StateReading | None


class _Candidate(NamedTuple):
    step: int
    is_part: bool
    directory: Path

    def open(self, run: Path) -> Checkpoint:
        return find_part(run, self.directory, jax.process_index()) if self.is_part else find(self.directory)


def newest_intact(run: Path, mesh: Mesh | None = None, parts: Path | None = None) -> Newest:
    """Reads checkpoints, newest first, until one is as it was written; all processes call it and get the same step.

    Those that are not are renamed to STEP.damaged, each with a line that says why.

    Args:
      run: directory.
      mesh: where the state will be wanted.
      parts: directory of this process's local parts; a step counts when all processes have theirs.

    Raises:
      UserError: the run's directory has checkpoints, and none is intact; nothing is renamed then.
    """
    damaged: list[tuple[_Candidate, str]] = []
    candidates = _candidates(run, parts)
    newest = Newest(None, None)
    for candidate in candidates:
        reading = _reading_of(candidate, run, mesh) if mesh is not None else None
        found = damages_of(candidate.directory, reading=reading, is_part=candidate.is_part)
        if candidate.is_part and not found:
            found = _gaps(candidate)
        if not found:
            newest = Newest(candidate.open(run), reading)
            break
        damaged.append((candidate, f"{found[0]}{others(found)}"))
    durable = [(candidate, why) for candidate, why in damaged if not candidate.is_part]
    if newest.checkpoint is None and durable:
        raise UserError(
            f"no checkpoint of {run} is intact; the newest, {durable[0][0].step}: {durable[0][1]}; restore one from a "
            "copy, or choose another output"
        )
    if damaged:
        new_talk("damaged").meet("told", decide=lambda words: _tell(damaged))
        for candidate, _ in damaged:
            if candidate.is_part or jax.process_index() == 0:
                candidate.directory.rename(_free_name(candidate.directory))
        new_talk("damaged").meet("set aside")
    return newest


def _candidates(run: Path, parts: Path | None) -> list[_Candidate]:
    """Newest first; of each step what is durable before its parts."""

    def decide(words: list[str]) -> str:
        durable, held = steps_on_disk(run), [set(json.loads(word)) for word in words]
        common = sorted(set.intersection(*held))
        if lost := _lost(run, held, max([*common, *durable], default=-1)):
            print(f"warning: {lost}", file=sys.stderr, flush=True)
        return json.dumps({"durable": durable, "common": common})

    own = steps_of(parts) if parts is not None else []
    steps = json.loads(new_talk("steps").meet("steps", json.dumps(own), decide))
    found = [_Candidate(step, False, run / "checkpoints" / str(step)) for step in steps["durable"]]
    if parts is not None:
        found += [_Candidate(step, True, parts / str(step)) for step in steps["common"]]
    return sorted(found, key=lambda candidate: (-candidate.step, candidate.is_part))


def _lost(run: Path, held: list[set[int]], newest: int) -> str:
    """Says that a later step than the newest whole one cannot be used, if there is one."""
    latest = max(set.union(*held), default=-1)
    if latest <= newest:
        return ""
    absent = [str(process) for process, steps in enumerate(held) if latest not in steps]
    names = ", ".join(absent[:8]) + (" ..." if len(absent) > 8 else "")
    return (
        f"{run}: local checkpoint {latest} is not used: process{'es' if len(absent) > 1 else ''} {names} of "
        f"{len(held)} ha{'ve' if len(absent) > 1 else 's'} no part of it (killed while it saved, or on another host)"
    )


def _gaps(candidate: _Candidate) -> list[Damage]:
    """Arrays that the parts of all processes are not the whole of: what is absent would be read as zero."""

    def decide(words: list[str]) -> str:
        wrong = []
        for item, names in json.loads(words[0])["names"].items():
            parts = [json.loads(word)[item] for word in words]
            for name in names:
                written = sum(part[name][0] for part in parts if name in part)
                wanted = max((part[name][1] for part in parts if name in part), default=1)
                if written != wanted:
                    wrong.append(f"{item}: {written} of {wanted} chunks of {name}")
        return json.dumps(wrong)

    items = ("params", "optimizer")
    own: dict[str, Any] = {item: chunks_of_part(candidate.directory / item, jax.process_index()) for item in items}
    own["names"] = {item: array_names(candidate.directory / item) for item in items}
    wrong = json.loads(new_talk("parts").meet("chunks", json.dumps(own), decide))
    return [Damage("all parts", problem) for problem in wrong]


def _tell(damaged: list[tuple[_Candidate, str]]) -> str:
    for candidate, why in damaged:
        what = f"local checkpoint {candidate.directory}" if candidate.is_part else candidate.directory
        print(f"warning: {what} is damaged and set aside: {why}", file=sys.stderr, flush=True)
    return ""


def _reading_of(candidate: _Candidate, run: Path, mesh: Mesh) -> StateReading | None:
    """Where the state of a step belongs; None when it cannot be told, or takes too much of the host's memory."""
    try:
        reading = StateReading(candidate.open(run), mesh)
    except Exception:  # whatever a damaged index, or a damaged meta, may say: its verification tells what is wrong
        return None
    return reading if reading.bytes < _available_memory() / 2 else None


def _available_memory() -> int:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _free_name(directory: Path) -> Path:
    names = (directory.with_name(f"{directory.name}{DAMAGED}{number or ''}") for number in range(1000))
    return next(name for name in names if not name.exists())
