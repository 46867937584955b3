"""What a run's directory says of it. Only files are read, and none of them is needed but config.yaml."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlite_jax.config import RunConfig
from tlite_jax.config_files import load_config
from tlite_jax.data.segment_files import read_segments, timeline_of
from tlite_jax.data.segments import Timeline
from tlite_jax.errors import UserError
from tlite_jax.telemetry.goodput import FILE, Account, account, read_starts
from tlite_jax.telemetry.metrics import read_jsonl
from tlite_jax.telemetry.stragglers import FILE as STRAGGLERS


@dataclass(frozen=True)
class Consumed:
    """A bucket's rows: what the plan of the whole stage takes, and what was read so far."""

    name: str
    labels: Mapping[str, str]
    rows: int
    planned: int
    consumed: int


@dataclass(frozen=True)
class RunData:
    """A run, as its files tell.

    Attributes:
      records: one per logged step, ascending.
      total_steps: at which the run ends; None when it has no plan yet that would tell.
      account: None for a run that kept none of its time.
      consumed: empty when the run has no plan yet.
      seconds_silent: since metrics were last written.
      stragglers: what was said of slow processes: step, time, process, slow, text and more.
    """

    directory: Path
    config: RunConfig
    config_text: str
    records: Sequence[Mapping[str, Any]]
    total_steps: int | None
    account: Account | None
    consumed: Sequence[Consumed]
    seconds_silent: float
    stragglers: Sequence[Mapping[str, Any]] = ()

    @property
    def step(self) -> int:
        """Completed steps."""
        return last_step(self.records)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens seen, values) of a metric, at the steps that have it."""
        tokens_per_step = self.config.train.batch_size * self.config.data.sequence_length
        found = [record for record in self.records if name in record]
        x = np.array([record["step"] * tokens_per_step for record in found], float)
        return x, np.array([record[name] for record in found], float)

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix/` in names of metrics, sorted."""
        found = {name for record in self.records for name in record if name.startswith(f"{prefix}/")}
        return sorted(name.removeprefix(f"{prefix}/") for name in found)


def read_run(directory: Path) -> RunData:
    """Reads a run's directory.

    Raises:
      UserError: it holds no run, or a file of it is damaged.
    """
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{directory} holds no run: it has no config.yaml; give a run's directory")
    config = load_config(config_file)
    metrics, goodput = directory / "metrics.jsonl", directory / FILE
    starts = read_starts(goodput)
    records = read_jsonl(metrics) if metrics.exists() else []
    segments, _ = read_segments(directory)
    timeline = timeline_of(directory, segments) if segments else None
    batch, steps = config.train.batch_size, config.train.steps
    if timeline is not None and steps is None:
        steps = timeline.total_rows // batch
    touched = [path.stat().st_mtime for path in (metrics, goodput) if path.exists()]
    return RunData(
        directory,
        config,
        config_file.read_text(encoding="utf-8"),
        records,
        steps,
        account(starts) if starts else None,
        () if timeline is None else _consumed(timeline, batch * last_step(records), batch * (steps or 0)),
        max(0.0, time.time() - max(touched)) if touched else 0.0,
        _findings(directory / STRAGGLERS),
    )


def last_step(records: Sequence[Mapping[str, Any]]) -> int:
    """Completed steps."""
    return int(records[-1]["step"]) if records else 0


def _findings(path: Path) -> list[Mapping[str, Any]]:
    """Lines of a file that is there when there was something to say; a torn one is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def _consumed(timeline: Timeline, rows: int, total_rows: int) -> list[Consumed]:
    """What the run's first `rows` rows and all `total_rows` of them take of each bucket."""
    now, end = (timeline.consumed(min(count, timeline.total_rows)) for count in (rows, total_rows))
    found = {bucket.name: bucket for bucket in timeline.buckets}  # the newest contents of a name
    return [
        Consumed(name, bucket.labels, bucket.rows, end.get(name, 0), now.get(name, 0)) for name, bucket in found.items()
    ]
