"""Going back in a run, and leaving batches out: a new list of segments, and later checkpoints set aside."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.checkpoint.parts import forget_parts
from tlite_jax.config_files import load_config
from tlite_jax.data.files import read_json, write_json
from tlite_jax.data.segment_files import Rewind, read_segments, timeline_of, write_timeline
from tlite_jax.data.segments import Timeline
from tlite_jax.errors import UserError
from tlite_jax.train.directory import ANOMALIES_FILE, CONFIG_FILE, count_steps

DIRECTORY = "rewound"
RECORD = "rewind.json"


@dataclass(frozen=True)
class Rewound:
    """What a rewind does: from which step the run goes on, without which rows, to which step."""

    step: int
    skipped_rows: dict[str, int]
    total_steps: int
    set_aside: tuple[int, ...]
    directory: Path
    timeline: Timeline


def rewind(
    run: Path, *, to: int | None, skip: tuple[int, int] | None, dry_run: bool = False, automatic: bool = False
) -> Rewound:
    """Takes a run back to the newest checkpoint at or before a step; interrupted, the same call finishes it.

    Later checkpoints and the metrics so far move to RUN/rewound/N; nothing is deleted. No process may be training it.

    Args:
      run: its directory.
      to: a step; None: the one before the first skipped.
      skip: first and last step, as the run has counted them so far, whose batches are left out from now on; what
        came after them follows at once.
      dry_run: only find out.
      automatic: the run does it itself; without a checkpoint that old it goes back to its beginning.

    Raises:
      UserError: no run, no such checkpoint or steps, another rewind under way.
    """
    if not (run / CONFIG_FILE).exists():
        raise UserError(f"{run} is not a run; give the directory that `train` writes (output in its config)")
    to = _target(to, skip)
    declared, pending = read_segments(run)
    if pending is not None and (pending.to, pending.skip) != (to, skip):
        raise UserError(f"another rewind of {run} was interrupted; first give again: rewind {run} {pending.words}")
    automatic = pending.automatic if pending is not None else automatic
    at = _place_before(run, to, or_beginning=automatic)
    timeline = timeline_of(run, declared or find(run).meta.segments)
    directory = run / DIRECTORY / (pending.directory if pending else _next_name(run / DIRECTORY))
    after = timeline if pending or skip is None else _without(timeline, run, at, skip)
    set_aside = tuple(step for step in steps_on_disk(run) if step > at.step or not at.has_checkpoint)
    if not dry_run:
        forget_parts(run)  # they may be of steps that are gone back from
        record = Rewind(to, skip, directory.name, automatic)
        write_timeline(run, after, record)
        _set_aside(run, set_aside, directory, record)
        write_timeline(run, after)
    skipped = {name: rows - timeline.skipped(timeline.total_rows).get(name, 0) for name, rows in _skipped(after)}
    _, total = count_steps(load_config(run / CONFIG_FILE), after)
    return Rewound(at.step, {n: rows for n, rows in skipped.items() if rows}, total, set_aside, directory, after)


def finish_automatic(run: Path) -> None:
    """Finishes a rewind that the run itself has declared and that was interrupted, if there is one.

    Raises:
      UserError: as `rewind` does.
    """
    _, pending = read_segments(run)
    if pending is not None and pending.automatic:
        rewind(run, to=pending.to, skip=pending.skip)


def count_automatic(run: Path) -> int:
    """Rewinds that the run itself has declared since the last one that was declared by hand."""
    number = 0
    for directory in sorted((run / DIRECTORY).glob("*"), key=_number, reverse=True):
        if not (directory / RECORD).exists() or not read_json(directory / RECORD)["automatic"]:
            break
        number += 1
    return number


def _target(to: int | None, skip: tuple[int, int] | None) -> int:
    if to is None and skip is None:
        raise UserError("nothing to do: give --to STEP, --skip FIRST..LAST or both")
    if skip is not None and not 1 <= skip[0] <= skip[1]:
        raise UserError(f"--skip {skip[0]}..{skip[1]}: give the first and the last step, e.g. --skip 120..125")
    if to is None:
        assert skip is not None
        return skip[0] - 1
    return to


@dataclass(frozen=True)
class _Place:
    """Where a run goes on: steps done and rows read."""

    step: int
    rows: int
    has_checkpoint: bool


def _place_before(run: Path, to: int, *, or_beginning: bool) -> _Place:
    steps = steps_on_disk(run)
    if before := [step for step in steps if step <= to]:
        return _Place(before[-1], find(run, before[-1]).meta.rows_consumed, True)
    if or_beginning:
        return _Place(0, 0, False)
    find(run)  # which says that there is none at all
    raise UserError(f"{run} has no checkpoint at or before step {to}; it has {', '.join(map(str, steps))}")


def _without(timeline: Timeline, run: Path, at: _Place, skip: tuple[int, int]) -> Timeline:
    """The timeline without some steps, counted from a place that comes before them."""
    first, last = skip
    if first <= at.step:
        raise UserError(
            f"step {first} is part of the checkpoint of step {at.step} that --to leaves; give --to {first - 1} or less"
        )
    batch_size = load_config(run / CONFIG_FILE).train.batch_size
    start = at.rows + (first - 1 - at.step) * batch_size
    stop = start + (last - first + 1) * batch_size
    if stop > timeline.total_rows:
        num_steps = at.step + (timeline.total_rows - at.rows) // batch_size
        raise UserError(f"--skip {first}..{last}: the run has no more than {num_steps} steps")
    return timeline.without(start, stop)


def _skipped(timeline: Timeline) -> list[tuple[str, int]]:
    return list(timeline.skipped(timeline.total_rows).items())


def _number(directory: Path) -> int:
    return int(directory.name) if directory.name.isdecimal() else 0


def _next_name(directory: Path) -> str:
    return str(1 + max(map(_number, directory.glob("*")), default=0))


def _set_aside(run: Path, steps: tuple[int, ...], directory: Path, record: Rewind) -> None:
    """Moves checkpoints and copies metrics and anomalies; what has been moved already is left."""
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORD, {"to": record.to, "skip": record.skip, "automatic": record.automatic})
    for log in (run / "metrics.jsonl", run / ANOMALIES_FILE):
        if log.exists() and not (directory / log.name).exists():
            partial = directory / f".{log.name}.partial"
            shutil.copyfile(log, partial)
            partial.rename(directory / log.name)
    for step in sorted(steps, reverse=True):
        (run / "checkpoints" / str(step)).rename(directory / "checkpoints" / str(step))
