"""A run in Weights & Biases. Needs the extra `wandb`; imported only by the process that speaks to it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from tlite_jax.telemetry.trackers.process import Point


class WandbRun:
    """Metrics under their names, over `step`, which is a metric too: a step done again after a failure is kept."""

    def __init__(self, run: Any):
        self._run = run
        self.url: str | None = run.url

    def log(self, points: Sequence[Point]) -> None:
        """See Tracker."""
        for step, _, values in points:
            self._run.log({**values, "step": step})

    def close(self, finished: bool) -> None:
        """See Tracker."""
        self._run.finish(exit_code=0 if finished else 1)


def open_run(settings: Mapping[str, Any]) -> WandbRun:
    """Starts the run, or goes on with it where W&B knows its id.

    Args:
      settings: `project`, `entity`, `name`, `group`, `tags`, `mode`; `id`; `directory` of the run; `config`;
        `history` (metrics.jsonl or None) and `start_step`, up to which it is told again where that is needed.
    """
    run = wandb.init(
        **{key: settings[key] for key in ("project", "entity", "name", "group", "tags", "mode", "id", "config")},
        dir=settings["directory"],
        resume=None if settings["mode"] == "offline" else "allow",
        allow_val_change=True,
        settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    opened = WandbRun(run)
    if settings["mode"] == "offline":
        # `wandb sync` replaces a run by one with the same id: the newest directory has to hold all of it.
        opened.log(list(_logged(settings["history"], settings["start_step"])))
    return opened


def _logged(history: str | None, last_step: int) -> Iterator[Point]:
    """What metrics.jsonl, which may be growing, has of the steps before this start."""
    if history is None or not Path(history).exists():
        return
    for line in Path(history).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["step"] > last_step:
            return
        step, seconds = record.pop("step"), record.pop("time")
        yield step, seconds, {name: float(value) for name, value in record.items()}
