"""Spikes while a run trains: told, written down, counted, and when to go back before them.

All of it follows from the values of steps, the same on all processes because one reduction over all devices made them,
and from what the checkpoint that the run went on from says of the steps before it. So a resumed run decides as an
undisturbed one.
"""

import sys
from collections.abc import Collection

import jax
import numpy as np
from jax.experimental import multihost_utils

from tlite_jax.checkpoint import Recent
from tlite_jax.config import SpikesConfig
from tlite_jax.errors import SpikesError
from tlite_jax.train.anomalies import Anomalies
from tlite_jax.train.rewind import count_automatic
from tlite_jax.train.run import Run
from tlite_jax.train.spike_detector import Spike, SpikeDetector


class SpikeFoundError(Exception):
    """Training is to go back before steps `first` to `last`, which spike; `train.spike_rewind` does it."""

    def __init__(self, first: int, last: int):
        super().__init__(f"steps {first} to {last} spike")
        self.first, self.last = first, last


class Spikes:
    """Looks at every finite step.

    Args:
      run: its `train.spikes` says what is looked at.
      anomalies: where spikes are written down.
    """

    def __init__(self, run: Run, anomalies: Anomalies):
        self._run, self._config, self._anomalies = run, run.config.train.spikes, anomalies
        recent = run.resumed.meta.recent if run.resumed is not None else Recent()
        self._detector = SpikeDetector(self._config, recent.losses, recent.gradient_norms)
        self._in_a_row = list(recent.spikes)
        self._rewinds = 0
        if self._config.action == "rewind":
            self._rewinds = _of_process_0(count_automatic(run.directory))

    @property
    def recent(self) -> Recent:
        """What a checkpoint says of the steps before it."""
        losses, norms = self._detector.window
        return Recent(losses=losses, gradient_norms=norms, spikes=tuple(self._in_a_row))

    def see(self, step: int, loss: float, gradient_norm: float) -> dict[str, float]:
        """Takes a finite step, in order; returns what is to be logged with it, nothing where it is no spike."""
        if self._config.action == "off":
            return {}
        if self._begins_plan(step):
            self._detector.forget()
        found = self._detector.see(loss, gradient_norm)
        if not found:
            self._in_a_row.clear()
            return {}
        self._in_a_row.append(step)
        deviations = {f"{spike.name}_deviations": spike.deviations for spike in found}
        medians = {f"{spike.name}_median": spike.median for spike in found}
        self._anomalies.spiked(step, {"loss": loss, "gradient_norm": gradient_norm, **medians, **deviations})
        if jax.process_index() == 0:
            print(f"warning: step {step} spikes: {_words(found)}", file=sys.stderr, flush=True)
        return {"spikes": float(self._anomalies.num_spikes), **deviations}

    def decide(self) -> None:
        """To be called when a step has been logged.

        Raises:
          SpikeFoundError: the run is to go back.
          SpikesError: it is to go back, and has done so too often.
        """
        row, config = self._in_a_row, self._config
        if config.action != "rewind" or len(row) < config.in_a_row:
            return
        if self._rewinds >= config.max_rewinds:
            raise SpikesError(
                f"steps {row[0]} to {row[-1]} spike after {self._rewinds} automatic rewinds of {self._run.directory}: "
                "look at its anomalies.jsonl and rewound/; then lower optimizer.learning_rate, go further back with "
                "`python -m launch rewind`, or raise train.spikes.max_rewinds"
            )
        raise SpikeFoundError(row[0], row[-1])

    def _begins_plan(self, step: int) -> bool:
        """Whether a declared change of the data begins with the step: another level of the loss is no spike."""
        run = self._run
        size = run.config.train.batch_size
        start = run.rows_consumed + (step - 1 - run.start_step) * size
        pairs = zip(run.segments, run.segments[1:], strict=False)
        return any(
            after.plan_hash != before.plan_hash and start <= after.start_row < start + size for before, after in pairs
        )


def kept_to_go_back(config: SpikesConfig, steps: Collection[int]) -> Collection[int]:
    """Which of the checkpoints on disk a rewind may need, however soon the next spike comes.

    Two besides the newest: the one to go back to now, and the one that will be it when the run has gone on.
    """
    if config.action != "rewind" or not steps:
        return ()
    far_enough = [step for step in sorted(steps) if step <= max(steps) + 1 - config.in_a_row - config.back]
    return {*far_enough[-1:], min(set(steps).difference(far_enough))}


def _words(found: list[Spike]) -> str:
    names = {"loss": "loss", "gradient_norm": "gradient norm"}
    return ", ".join(
        f"{names[spike.name]} {spike.value:.4g} is {spike.deviations:.1f} deviations above {spike.median:.4g}"
        for spike in found
    )


def _of_process_0(number: int) -> int:
    """What process 0 has found on the disk, on all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number
