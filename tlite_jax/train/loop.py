"""The training loop: batches in, metrics and checkpoints out. Never waits for the step it has just started."""

import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from tlite_jax import optimizer
from tlite_jax.checkpoint import Meta
from tlite_jax.checkpoint.local import LocalTier
from tlite_jax.checkpoint.parts import claim_parts
from tlite_jax.checkpoint.saver import Saver, saver
from tlite_jax.data.loader import batches
from tlite_jax.sharding import BATCH_SPEC
from tlite_jax.telemetry.environment import environment
from tlite_jax.telemetry.evaluated import Evaluated
from tlite_jax.telemetry.goodput import FILE, Stopwatch
from tlite_jax.telemetry.metrics import Sink
from tlite_jax.telemetry.resources import Resources
from tlite_jax.train.corruption import checked
from tlite_jax.train.lock import locked
from tlite_jax.train.log import Log, writer
from tlite_jax.train.run import Run, first_state
from tlite_jax.train.spikes import SpikeFoundError, kept_to_go_back
from tlite_jax.train.state import TrainState
from tlite_jax.train.step import Step, check_batch, make_step


class Evaluation(Protocol):
    """What is measured of the model while it is trained; `evaluate.in_loop` has it."""

    stopped: str | None
    """Why the run goes no further than where it starts; None: it does."""

    def due(self, step: int) -> bool:
        """Whether the state after a step is to be evaluated, and has not been before an interruption."""

    def __call__(self, step: int, params: Any) -> Evaluated:
        """Evaluates stored, sharded parameters; raises FloatingPointError when a score is not finite."""

    def kept(self, steps: Collection[int]) -> Collection[int]:
        """Which of the steps on disk are not to be deleted."""


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended.

    Attributes:
      step, state: where; state None: at a spike, of which nothing is saved.
      signal: the one that stopped it early, if any.
      first_step_seconds: until the first step was seen to be done, compilation included; None when there was none.
      stopped: why an evaluation ended it early; None: it did not.
    """

    step: int
    state: TrainState | None
    signal: int | None
    first_step_seconds: float | None
    stopped: str | None = None


def train(
    run: Run,
    mesh: Mesh,
    *,
    console: Sink | None = None,
    evaluate: Evaluation | None = None,
    spent: Mapping[str, float] | None = None,
    around_step: Callable[[Step], Step] | None = None,
    entered: Callable[[str], object] | None = None,
) -> Result:
    """Trains until `run.total_steps` or a SIGINT or SIGTERM, which saves and stops.

    Args:
      run: from `open_run`.
      mesh: from `make_mesh`.
      console: where people watch, on process 0.
      evaluate: asked after every step whether it is due; what it returns is logged. The checkpoint of a step that it
        calls the best so far is saved and kept; when it says to stop, the run saves and stops.
      spent: section of `telemetry.goodput` -> seconds that this start has taken before this call.
      around_step: what to call in place of the step, for those who look on.
      entered: called with each section of `telemetry.goodput` that begins, and with "other" when it ends.

    Raises:
      UserError: a batch that does not divide over the mesh; damaged data.
      FloatingPointError: `train.max_skipped_in_a_row` steps were skipped in a row; none of them is saved.
      SpikeFoundError: the run is to go back before a spike: `train.spike_rewind.train_to_the_end` does it.
      SpikesError: it has gone back too often.
      CorruptionError: a device computes or holds other bits than it should.
    """
    config = run.config
    assert config.model is not None
    check_batch(config.train.batch_size, mesh, config.execution.num_microbatches)
    schedule = optimizer.make_schedule(config.schedule, config.optimizer.learning_rate, run.total_steps)
    step_fn = make_step(
        config.model,
        config.optimizer,
        config.execution,
        mesh,
        schedule=lambda step: schedule(step + run.schedule_offset),
        document_masking=config.data.has_segments,
        norms=config.telemetry.norms_every > 0,
    )
    data = batches(
        run.timeline.from_row(run.rows_consumed),
        run.store,
        sharding=NamedSharding(mesh, BATCH_SPEC),
        batch_size=config.train.batch_size,
        start_row=run.rows_consumed,
        document_masking=config.data.document_masking,
    )

    def kept(steps: Collection[int]) -> Collection[int]:
        by_evaluation = evaluate.kept(steps) if evaluate is not None else ()
        return {*by_evaluation, *kept_to_go_back(config.train.spikes, steps)}

    # Signals are ours until the last checkpoint is whole.
    with (
        _only_trainer(run),
        _stopwatch(run, mesh, spent or {}, entered) as watch,
        _signals() as stop,
        saver(run.directory, config.checkpoint, kept, _local_tier(run, mesh)) as checkpoints,
        writer(run, console) as metrics_writer,
    ):
        with watch.section("restore"):
            state = jax.block_until_ready(first_state(run, mesh))
        log = Log(run, mesh, metrics_writer)
        step_fn = checked(step_fn, run, mesh, log.anomalies)
        if around_step is not None:
            step_fn = around_step(step_fn)
        try:
            result = _loop(run, state, step_fn, data, checkpoints, log, stop, evaluate, watch)
        except SpikeFoundError as spike:
            if stop.signal is None:
                watch.close("went back before a spike")
                raise
            # There is no time to go back; the next start meets the same spike.
            result = Result(spike.last, None, stop.signal, log.first_step_seconds)
        watch.close(_status(result))
        return result


def _loop(
    run: Run,
    state: TrainState,
    step_fn: Callable,
    data: Iterator,
    checkpoints: Saver,
    log: Log,
    stop: "_Stop",
    evaluate: Evaluation | None,
    watch: Stopwatch,
) -> Result:
    config = run.config
    step = run.start_step
    saved = run.start_step if run.resumed and run.resumed.part is None else None
    stopped = evaluate.stopped if evaluate is not None else None
    local_every = config.checkpoint.local_every

    def save_locally() -> None:
        with watch.section("checkpoint"):
            log.anomalies.check_saved(state.params)
            checkpoints.save_locally(state, run.meta(step, log.spikes.recent))
        log.write_failures(step, checkpoints.failures())

    def save() -> None:
        nonlocal saved
        with watch.section("step"):
            log.flush()
        if step != saved:  # the disk would not tell: that save may be under way
            with watch.section("checkpoint"):
                log.anomalies.check_saved(state.params)
                checkpoints.save(state, run.meta(step, log.spikes.recent))
            saved = step
            log.write_failures(step, checkpoints.failures())

    def run_evaluation() -> None:
        nonlocal stopped
        if evaluate is None or not evaluate.due(step):
            return
        with watch.section("step"):
            log.flush()
        with watch.section("evaluation"):
            evaluated = evaluate(step, state.params)
            log.write_evaluation(step, evaluated)
        stopped = evaluated.stop
        if evaluated.improved or stopped:
            save()
        if step > run.start_step:  # else the next step compiles, which is no throughput
            log.restart(step)

    if stopped is None:
        run_evaluation()
    resources = Resources(jax.local_devices(), every=config.train.log_every, last=run.total_steps, step=step)
    log.begin()
    due = False
    while step < run.total_steps and stopped is None and not stop.reached(step):
        with watch.section("data_wait"):
            batch = next(data)
        with watch.section("step" if step > run.start_step else "compile"):
            state, metrics = step_fn(state, batch)
            step += 1
        with watch.section("step"):
            log.later(step, {**metrics, **resources.read(step, watch.spent("data_wait"))})
        watch.reached(step - 1)  # the last one has only been started
        log.write_failures(step, checkpoints.failures())
        due = due or step % config.checkpoint.every == 0 or step == run.total_steps
        due_locally = local_every is not None and step % local_every == 0
        if due or due_locally:
            with watch.section("step"):
                log.flush()
            if not log.anomalies.in_a_row:  # else the next step that is not skipped is saved
                if due:
                    save()
                else:
                    save_locally()
                due = False
        run_evaluation()
    save()
    with watch.section("checkpoint"):
        _save_at_last(checkpoints, state, run.meta(step, log.spikes.recent))
    if stop.signal is None:
        checkpoints.run_is_done()
    watch.reached(step)
    return Result(step, state, stop.signal, log.first_step_seconds, stopped)


def _save_at_last(checkpoints: Saver, state: TrainState, meta: Meta) -> None:
    """Returns when the last checkpoint is on the disk. Raises OSError when it cannot be brought there."""
    checkpoints.wait()
    if checkpoints.failed_step == meta.step:  # all processes know it
        checkpoints.save(state, meta)  # what failed has given its room back
        checkpoints.wait()
    if checkpoints.failed_step == meta.step:
        raise OSError(checkpoints.failures()[-1])


def _local_tier(run: Run, mesh: Mesh) -> LocalTier | None:
    directory = run.config.checkpoint.local_dir
    if directory is None:
        return None
    return LocalTier(claim_parts(run.directory, directory, mesh), run.start_step if run.resumed else -1)


def _only_trainer(run: Run) -> AbstractContextManager[None]:
    """Process 0 holds the directory for all."""
    return locked(run.directory) if jax.process_index() == 0 else nullcontext()


@contextmanager
def _stopwatch(
    run: Run, mesh: Mesh, spent: Mapping[str, float], entered: Callable[[str], object] | None
) -> Iterator[Stopwatch]:
    """Of this start; on process 0 it writes, but not when the run was done before."""
    writes = jax.process_index() == 0 and run.start_step < run.total_steps
    path = run.directory / FILE if writes else None
    device = mesh.devices.flat[0]
    facts = {
        "devices": f"{mesh.size} x {device.device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "execution": run.config.execution_hash(),
    }
    with Stopwatch(path, run.start_step, {**environment(), **facts}, spent=spent, entered=entered) as watch:
        yield watch


def _status(result: Result) -> str:
    if result.stopped is not None:
        return result.stopped
    return "done" if result.signal is None else signal.Signals(result.signal).name


class _Stop:
    """Whether a signal asks to save and stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def notice(self, number: int, _: FrameType | None) -> None:
        """The handler: the first signal asks, a second SIGINT insists."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def reached(self, step: int) -> bool:
        """True when this step is not to be started.

        In a job of several processes jax's own SIGTERM handler tells the coordinator, which names a step that all
        of them stop before; no device is waited for.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Handles SIGINT and SIGTERM while training; elsewhere than on the main thread, signals are not ours."""
    stop = _Stop()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
