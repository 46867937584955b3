"""What the training loop logs: each step's metrics, read back only when the next step has been started."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tlite_jax.telemetry.evaluated import Evaluated
from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter, Sink, TensorBoardSink
from tlite_jax.telemetry.prometheus import PrometheusSink
from tlite_jax.telemetry.throughput import Throughput, flops_per_token, peak_flops
from tlite_jax.telemetry.trackers.setup import make_trackers
from tlite_jax.train.anomalies import Anomalies
from tlite_jax.train.bucket_losses import bucket_losses
from tlite_jax.train.norms import named_norms
from tlite_jax.train.run import Run
from tlite_jax.train.spikes import Spikes
from tlite_jax.train.step import NORMS, ROWS

_ARRAYS = (ROWS, NORMS)


class Log:
    """Reads a step's metrics back only after the next step has been started."""

    def __init__(self, run: Run, mesh: Mesh, writer: MetricsWriter):
        config = run.config
        assert config.model is not None
        self._run, self._model = run, config.model
        self._every, self._total = config.train.log_every, run.total_steps
        self._norms_every = config.telemetry.norms_every
        self._writer = writer
        self.anomalies = Anomalies(run)
        self.spikes = Spikes(run, self.anomalies)
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        peak = config.telemetry.peak_flops_per_device or peak_flops(mesh.devices.flat[0].device_kind)
        self._throughput = Throughput(
            flops_per_token(config.model, config.data.sequence_length),
            tokens_per_step=config.train.batch_size * config.data.sequence_length,
            num_devices=mesh.size,
            peak_flops_per_device=peak,
        )
        self._tokens_per_step = config.train.batch_size * config.data.sequence_length
        self._began = time.monotonic()
        self._num_failures = 0
        self.first_step_seconds: float | None = None

    def begin(self) -> None:
        """Notes that the first step is about to be compiled and started."""
        self._began = time.monotonic()

    def later(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Notes a step just started, its metrics on devices or plain, and logs the one before it."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Logs the step noted last, waiting for it. A skipped or spiking one is logged whatever `train.log_every` is.

        Raises:
          FloatingPointError: as `Anomalies.skipped` does.
          SpikeFoundError, SpikesError: as `Spikes.decide` does.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        first: dict[str, float] = {}
        if self.first_step_seconds is None:
            metrics["loss"].block_until_ready()
            self.first_step_seconds = time.monotonic() - self._began
            first = {"first_step_seconds": self.first_step_seconds}
        skipped = bool(metrics["skipped"])  # reading it waits for the step, logged or not: the host stays one ahead
        spike = {} if skipped else self.spikes.see(step, float(metrics["loss"]), float(metrics["gradient_norm"]))
        shows_norms = self._norms_every > 0 and (skipped or bool(spike) or step % self._norms_every == 0)
        if skipped or spike or shows_norms or step % self._every == 0 or step == self._total:
            values = {name: float(value) for name, value in metrics.items() if name not in (*_ARRAYS, "tokens")}
            values["tokens_seen"] = float(step * self._tokens_per_step)
            speeds = self._throughput.update(step, time.monotonic())
            parts = self._parts(step, metrics, shows_norms=shows_norms)
            self.write(step, {**values, **spike, **first, **speeds, **parts})
        if skipped:
            self.anomalies.skipped(step, float(metrics["loss"]), float(metrics["gradient_norm"]))
        else:
            self.anomalies.in_a_row = 0
            self.spikes.decide()

    def _parts(self, step: int, metrics: Mapping[str, Any], *, shows_norms: bool) -> dict[str, float]:
        """Losses by bucket and norms by group, where there is someone to write them."""
        if jax.process_index() != 0:
            return {}
        run = self._run
        first_row = run.rows_consumed + (step - 1 - run.start_step) * run.config.train.batch_size
        losses = bucket_losses(run.timeline, first_row, np.asarray(metrics[ROWS]))
        return {**losses, **(named_norms(self._model, np.asarray(metrics[NORMS])) if shows_norms else {})}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes at once."""
        self._writer.write(step, values)

    def write_evaluation(self, step: int, evaluated: Evaluated) -> None:
        """Writes at once."""
        self._writer.write_evaluation(step, evaluated)

    def write_failures(self, step: int, failures: Sequence[str]) -> None:
        """Tells people, and counts, what a save has come to."""
        for failure in failures:
            print(f"warning: {failure}; training goes on", file=sys.stderr, flush=True)
        if failures:
            self._num_failures += len(failures)
            self.write(step, {"checkpoint_failures": float(self._num_failures)})

    def restart(self, step: int) -> None:
        """Leaves what happened since the last step out of the throughput."""
        self._throughput.restart(step, time.monotonic())


@contextmanager
def writer(run: Run, console: Sink | None) -> Iterator[MetricsWriter]:
    """The sinks that a run asks for, closed at the end; none on processes other than 0."""
    sinks: list[Sink] = []
    if jax.process_index() == 0:
        telemetry = run.config.telemetry
        resume = run.start_step if run.resumed else -1  # without a checkpoint, nothing that was logged counts
        if telemetry.jsonl:
            sinks.append(JsonlSink(run.directory / "metrics.jsonl", resume_step=resume))
        if telemetry.tensorboard:
            sinks.append(TensorBoardSink(run.directory / "tensorboard", resume_step=resume))
        if telemetry.prometheus is not None:
            sinks.append(PrometheusSink(telemetry.prometheus, run.directory.resolve().name))
        sinks += make_trackers(run.config, run.directory, start_step=resume, total_steps=run.total_steps)
        if telemetry.console and console is not None:
            sinks.append(console)
    with MetricsWriter(sinks) as metrics_writer:
        yield metrics_writer
