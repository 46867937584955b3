"""Steps that went wrong: RUN/anomalies.jsonl, one line a step with all that its batch held, and when to give up.

A step whose loss or gradient norm is not finite changes no parameter (`train.step`). What is decided here depends on
that step's metrics alone, the same on all processes, and on the file: a resumed run goes on counting where it was.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tlite_jax.data.replay import contents
from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import replace_file
from tlite_jax.train.directory import ANOMALIES_FILE
from tlite_jax.train.run import Run

NOT_FINITE, SPIKE = "not_finite", "spike"
COMPUTED_TWICE, REPLICAS = "computed_twice", "replicas"  # computing them again does not find them again


class Anomalies:
    """Counts skipped steps and writes all that went wrong down.

    Attributes:
      in_a_row: skipped steps up to now without one between them that was not.
      num_spikes: steps up to now that were written down as spikes.

    Args:
      run: lines of steps after the one that it goes on from, left by a try that was interrupted, are removed, except
        those that say what a device did.

    Raises:
      UserError: the file holds lines that are not ours.
    """

    def __init__(self, run: Run):
        self._run, self._path = run, run.directory / ANOMALIES_FILE
        self._writes = jax.process_index() == 0
        before = run.start_step if run.resumed else -1
        lines = [found for found in _lines(self._path) if found[0] <= before or found[1] in (COMPUTED_TWICE, REPLICAS)]
        self.in_a_row = _streak([step for step, kind, _ in lines if kind == NOT_FINITE], run.start_step)
        self.num_spikes = sum(kind == SPIKE for _, kind, _ in lines)
        if self._writes and self._path.exists():
            replace_file(self._path, b"".join(line for _, _, line in lines))

    def skipped(self, step: int, loss: float, gradient_norm: float) -> None:
        """Writes a skipped step down, with its loss and gradient norm, and counts it.

        Raises:
          FloatingPointError: it is the last of `train.max_skipped_in_a_row`.
        """
        self.in_a_row += 1
        self.note(step, {"kind": NOT_FINITE, "loss": str(loss), "gradient_norm": str(gradient_norm)})
        if self.in_a_row >= self._run.config.train.max_skipped_in_a_row:
            first = step - self.in_a_row + 1
            which = f"step {step}" if first == step else f"steps {first} to {step}"
            raise FloatingPointError(
                f"the loss or its gradients are not finite at {which} (loss {loss}, gradient norm {gradient_norm}); "
                f"lower optimizer.learning_rate, or leave the batches that {self._path} names out: "
                f"python -m launch rewind {self._run.directory} --skip {first}..{step}"
            )

    def spiked(self, step: int, values: dict[str, Any]) -> None:
        """Writes a spike down and counts it."""
        self.num_spikes += 1
        self.note(step, {"kind": SPIKE, **values})

    def check_saved(self, params: Any) -> None:
        """Raises FloatingPointError when steps are being skipped because parameters are not finite any more."""
        if self.in_a_row and not bool(_finite(params)):
            raise FloatingPointError(
                f"parameters are not finite after {self.in_a_row} skipped steps: nothing is saved; start again from "
                "the newest checkpoint with a lower optimizer.learning_rate"
            )

    def note(self, step: int, values: dict[str, Any]) -> None:
        """Writes a step down, with what its batch held; on process 0."""
        if not self._writes:
            return
        run = self._run
        size = run.config.train.batch_size
        start = run.rows_consumed + (step - 1 - run.start_step) * size
        rows = list(contents(run.timeline, run.store, start, size))
        record = {"step": step, **values, "first_row": start, "rows": rows}
        with self._path.open("ab") as file:
            file.write(json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n")


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jax.numpy.stack([jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _streak(steps: list[int], last: int) -> int:
    """How many of ascending steps are the last ones up to `last`, without a gap."""
    found = np.array(steps[::-1], np.int64)
    return int(np.cumprod(found == last - np.arange(len(found))).sum())


def _lines(path: Path) -> list[tuple[int, str, bytes]]:
    """(step, kind, line) of a file that may be absent; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    result = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step, kind = record["step"], record["kind"]
            whole = isinstance(step, int) and line.endswith(b"\n")
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            result.append((step, kind, line))
        elif number < len(lines):
            raise UserError(f"{path}:{number} is not a line of anomalies; remove that line or move the file away")
    return result
