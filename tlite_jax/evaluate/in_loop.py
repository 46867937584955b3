"""Evaluation inside a run: measures, remembers in `RUN/evaluation/`, and says what is best and whether to stop.

    board.jsonl      a line for each evaluation: sums of every bucket, from which the board follows, and the objective
    alerts.jsonl     a line for each alert
    samples.jsonl    a line for each continuation of a prompt
    best.json        the best step so far

What has happened is read from these files, so that a run that goes on decides as if it had never been interrupted.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from tlite_jax.best import BOARD_FILE, best_step
from tlite_jax.evaluate.bits_per_byte import NotFiniteError
from tlite_jax.evaluate.board import Board, Measurement
from tlite_jax.telemetry.evaluated import Evaluated
from tlite_jax.telemetry.history import History, Record
from tlite_jax.telemetry.metrics import replace_file

ALERTS_FILE, SAMPLES_FILE = BOARD_FILE.with_name("alerts.jsonl"), BOARD_FILE.with_name("samples.jsonl")
BEST_FILE = BOARD_FILE.with_name("best.json")


class Keys(NamedTuple):
    """Name what was measured: lines under other keys are not compared with."""

    scores: str
    kl: str | None


class InLoopEvaluation:
    """What the training loop calls.

    Args:
      directory: of the run.
      board: reads measurements.
      keys: of what `measure` measures.
      measure: stored, sharded parameters -> (Measurement, further metrics).
      start: the base's measurement where the run starts as the base, so that step 0 need not be measured; else None.
      sample: parameters -> {prompt: continuation}; None: no samples.
      tasks: (step, parameters) -> {"tasks/NAME/METRIC": value}, empty where none are due; None: no tasks.
      every, total_steps: when.
      start_step: of the checkpoint that the run goes on from; None: from none.
      held: steps whose checkpoints are on disk.
    """

    def __init__(
        self,
        directory: Path,
        board: Board,
        keys: Keys,
        measure: Callable[[Any], tuple[Measurement, Mapping[str, float]]],
        *,
        start: Measurement | None,
        sample: Callable[[Any], Mapping[str, str]] | None,
        tasks: Callable[[int, Any], Mapping[str, float]] | None,
        every: int,
        total_steps: int,
        start_step: int | None,
        held: Collection[int],
    ):
        self._directory, self._board, self._keys = directory, board, keys
        self._measure, self._start, self._sample, self._tasks = measure, start, sample, tasks
        self._every, self._total_steps = every, total_steps
        self._held = set(held)
        writes = jax.process_index() == 0
        self._lines, self._alerts, self._samples = (
            History(directory / name, start_step, writes=writes) for name in (BOARD_FILE, ALERTS_FILE, SAMPLES_FILE)
        )
        self._writes = writes
        self._restate()
        self._write_best(best_step(self._known(), self._held))
        self.stopped = self._stop_of(start_step)

    def due(self, step: int) -> bool:
        """Whether a step is to be evaluated and has not been."""
        wanted = step == 0 or step % self._every == 0 or step == self._total_steps
        return _agreed(wanted and step not in {line["step"] for line in self._known()})

    def __call__(self, step: int, params: Any) -> Evaluated:
        """Evaluates.

        Args:
          step: batches completed.
          params: stored, sharded parameters.

        Raises:
          FloatingPointError: a score is not finite; names the step and the bucket.
        """
        began = time.monotonic()
        try:
            measured, metrics = self._measured(step, params)
        except NotFiniteError as error:
            raise FloatingPointError(f"{error} at step {step}; nothing of this step is kept as evaluated") from error
        tasks = {} if self._tasks is None else dict(self._tasks(step, params))
        texts = {} if self._sample is None else dict(self._sample(params))
        alerts = self._board.alerts(measured)
        line = {
            "step": step,
            "time": round(time.time(), 3),
            "keys": list(self._keys),
            **measured.to_json(),
            "objective": self._board.objective(measured),
            "tasks": tasks,
        }
        self._lines.append(line)
        for alert in alerts:
            self._alerts.append({"step": step, **alert._asdict()})
        for prompt, text in texts.items():
            self._samples.append({"step": step, "prompt": prompt, "continuation": text})
        best = best_step(self._known(), {*self._held, *([step] if step else [])})  # step 0 is where it came from
        self._write_best(best)
        if best is not None:
            self._held.add(best)
        stops = [str(alert) for alert in alerts if alert.action == "stop"]
        return Evaluated(
            metrics={
                **self._board.metrics(measured),
                **metrics,
                **tasks,
                "evaluation_seconds": time.monotonic() - began,
            },
            table=self._board.table(measured, best, self._task_notes(tasks)),
            texts={f"samples/{number}": prompt + text for number, (prompt, text) in enumerate(texts.items())},
            improved=_agreed(best == step),
            stop=_stop_message(step, stops) if _agreed(bool(stops)) else None,
        )

    def kept(self, steps: Collection[int]) -> Collection[int]:
        """Which of the steps on disk are not to be deleted: the best of them."""
        best = best_step(self._known(), steps)
        return () if best is None else (best,)

    def _measured(self, step: int, params: Any) -> tuple[Measurement, Mapping[str, float]]:
        if step == 0 and self._start is not None:
            return self._start, {}
        return self._measure(params)

    def _task_notes(self, tasks: Mapping[str, float]) -> list[str]:
        """A line for each score, beside that of the run's start."""
        first: Mapping[str, float] = next(
            (line.get("tasks", {}) for line in self._lines.records if line["step"] == 0), {}
        )
        return [
            f"{name} {value:.4f}" + (f", {first[name]:.4f} at step 0" if name in first else "")
            for name, value in tasks.items()
        ]

    def _known(self) -> Sequence[Record]:
        """Lines of the same text under the same base."""
        return [line for line in self._lines.records if line["keys"][0] == self._keys.scores]

    def _restate(self) -> None:
        """Gives each line the objective that the present config asks for, and forgets those of other text."""
        for number, line in enumerate(self._lines.records):
            self._lines.records[number] = {**line, "objective": self._objective_of(line)}
        for history in (self._lines, self._alerts, self._samples):
            history.rewrite()

    def _objective_of(self, line: Record) -> float | None:
        if line["keys"][0] != self._keys.scores:
            return None
        measured = Measurement.from_json(line)
        if line["keys"][1] != self._keys.kl:
            measured = measured._replace(divergences={})
        return self._board.objective(measured)

    def _stop_of(self, step: int | None) -> str | None:
        """Why the run has been stopped at a step, if it has and the present config would still stop it."""
        for line in self._known():
            if step is not None and line["step"] == step and line["keys"] == list(self._keys):
                alerts = self._board.alerts(Measurement.from_json(line))
                stops = [str(alert) for alert in alerts if alert.action == "stop"]
                return _stop_message(step, stops) if stops else None
        return None

    def _write_best(self, step: int | None) -> None:
        if not self._writes:
            return
        if step is None:
            (self._directory / BEST_FILE).unlink(missing_ok=True)
            return
        objective = next(line["objective"] for line in self._known() if line["step"] == step)
        content = {"step": step, "objective": objective, "checkpoint": f"checkpoints/{step}"}
        replace_file(self._directory / BEST_FILE, json.dumps(content).encode())


def _stop_message(step: int, alerts: Sequence[str]) -> str:
    return (
        f"stopped at step {step} by evaluation.watch: {'; '.join(alerts)}. Its checkpoint is saved; to go on from it, "
        "raise worse_by or set action: log"
    )


def _agreed(flag: bool) -> bool:
    """What process 0 says: it keeps the files."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))
