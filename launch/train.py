"""`python -m launch train CONFIG`."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from launch.job.pace import PaceWatch
    from launch.train_parts.profile import Profile
    from tlite_jax.train.loop import Result
    from tlite_jax.train.run import Run
    from tlite_jax.train.step import Step

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def main(
    config: Annotated[Path, typer.Argument(help="The run, as YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on although model, data or optimizer settings have changed.")
    ] = False,
    profile_steps: Annotated[
        str | None, typer.Option(help="FIRST:END, such as 10:13: trace these steps into OUTPUT/profile, for xprof.")
    ] = None,
    coordinator: Annotated[str | None, typer.Option(help="host:port of process 0, without a scheduler.")] = None,
    num_processes: Annotated[int | None, typer.Option(help="Processes in the job.")] = None,
    process_id: Annotated[int | None, typer.Option(help="This process, from 0.")] = None,
) -> None:
    """Train a run, or go on with it: the same command does both.

    Under Slurm, Open MPI, Kubernetes, torchrun or on a TPU pod the processes of a job find each other.
    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and stop, with exit status 75 (start me again) and 130; a process
    that loses another one ends with 76 (start me again).

    Example: python -m launch train configs/tlite_8b_stage1.yaml checkpoint.every=250 mesh.replica=12
    """
    from launch.job.distributed import initialize
    from launch.job.preemption import EXIT_PREEMPTED, ignore_signals, notice_signals
    from launch.train_parts.evaluation import check_evaluation

    notice_signals()
    initialize(coordinator, num_processes, process_id, _join_seconds(config, overrides or ()))
    import jax

    from launch.job.abort import LOST, restart_on_abort
    from launch.job.lost_peer import restart_when_alone
    from launch.job.mesh_fit import check_world
    from launch.job.pace import watch_pace
    from launch.job.peers import job_board
    from launch.train_parts.profile import Profile
    from tlite_jax.config_files import load_config
    from tlite_jax.sharding import make_mesh
    from tlite_jax.telemetry.goodput import FILE, note_end, process_age
    from tlite_jax.telemetry.trackers.setup import check_trackers
    from tlite_jax.telemetry.watchdog import Watchdog
    from tlite_jax.train.run import open_run

    loaded = load_config(config, overrides or ())
    profile = Profile(profile_steps, loaded.output / "profile") if profile_steps is not None else None
    check_world(loaded, jax.process_count(), jax.local_device_count())
    check_evaluation(loaded)
    check_trackers(loaded)
    if loaded.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(loaded.compilation_cache.resolve()))
    number = jax.process_index()
    stacks = loaded.output / "watchdog" / f"rank-{number}.log"
    board = job_board()

    def ended(why: str) -> str:
        with suppress(Exception):
            if number == 0:
                note_end(loaded.output / FILE, why)
        return why

    if board is not None:
        restart_on_abort(lambda: ended(LOST))
    with ExitStack() as stack:
        watchdog = Watchdog(loaded.watchdog, stacks, number, board, ended=lambda why: ended(f"watchdog: {why}")).start()
        stack.enter_context(closing(watchdog))
        pace = stack.enter_context(watch_pace(loaded, board, number, jax.process_count()))
        stack.enter_context(restart_when_alone())
        run = open_run(loaded, mesh=make_mesh(loaded.mesh), allow_change=allow_change)
        result = train_run(run, init_seconds=process_age(), profile=profile, pace=pace, entered=watchdog.enter)
    ignore_signals()
    if result.stopped is not None:
        raise typer.Exit(EXIT_FAILED)
    if result.signal is not None:
        raise typer.Exit(EXIT_PREEMPTED if result.signal == signal.SIGTERM else EXIT_INTERRUPTED)


def _join_seconds(config: Path, overrides: Sequence[str]) -> float:
    """That the other processes have to come in; a config that cannot be read is refused when they have."""
    from tlite_jax.config import WatchdogConfig
    from tlite_jax.config_files import load_config

    try:
        return load_config(config, overrides).watchdog.join
    except UserError:
        return WatchdogConfig().join


def train_run(
    run: "Run",
    init_seconds: float = 0.0,
    profile: "Profile | None" = None,
    pace: "PaceWatch | None" = None,
    entered: Callable[[str], object] = lambda section: None,
) -> "Result":
    """Trains a run on all devices there are, with the console and the evaluation that its config asks for.

    Args:
      run: from `open_run`.
      init_seconds: that starting has taken so far, for the account of the run's time.
      profile: of some of its steps.
      pace: compares this process's with the others'.
      entered: called with each section of `telemetry.goodput` that begins.
    """
    from tlite_jax.sharding import make_mesh
    from tlite_jax.train.spike_rewind import train_to_the_end

    mesh = make_mesh(run.config.mesh)

    def enter(section: str) -> None:
        entered(section)
        if pace is not None:
            pace.enter(section)

    def train_once(now: "Run") -> "Result":
        return _train_once(now, mesh, init_seconds if now is run else 0.0, (pace, profile), enter)

    with profile or nullcontext():
        return train_to_the_end(train_once, run, mesh)


def _train_once(
    run: "Run",
    mesh: "Mesh",
    init_seconds: float,
    watches: "tuple[PaceWatch | Profile | None, ...]",
    entered: Callable[[str], object],
) -> "Result":
    """Trains until the end or a spike."""
    import jax

    from launch.train_parts.evaluation import make_evaluation
    from tlite_jax.telemetry.console import ConsoleSink
    from tlite_jax.train.loop import train

    console = None
    if jax.process_index() == 0 and run.config.telemetry.console:
        config = run.config
        print(f"{run.directory}: semantic {config.semantic_hash()}, execution {config.execution_hash()}")
        if run.resumed is not None:
            print(f"going on from step {run.start_step} of {run.directory}")
        console = ConsoleSink(run.total_steps, run.start_step)
    began = time.monotonic()
    entered("evaluation" if run.config.evaluation.every else "other")
    evaluate = make_evaluation(run, mesh) if run.config.evaluation.every else None
    spent = {"init": init_seconds, "evaluation": time.monotonic() - began}

    def around(step_fn: "Step") -> "Step":
        for watch in watches:
            step_fn = watch.around(step_fn, run.start_step) if watch is not None else step_fn
        return step_fn

    result = train(run, mesh, console=console, evaluate=evaluate, spent=spent, around_step=around, entered=entered)
    if jax.process_index() == 0:
        _plot(run, evaluate)
        print(f"{run.directory}: step {result.step} of {run.total_steps}, {_ending(result)}")
        if result.first_step_seconds is not None:
            print(_goodput(run))
            print(f"the first step took {result.first_step_seconds:.1f} s, compilation included")
    return result


def _goodput(run: "Run") -> str:
    """Where the run's time went, over all its starts, in a line."""
    from tlite_jax.telemetry.goodput import FILE, account, read_starts

    spent = account(read_starts(run.directory / FILE))
    most = sorted((-seconds, part) for part, seconds in spent.parts.items() if part != "step" and seconds > 0)[:4]
    rest = ", ".join(f"{part.replace('_', ' ')} {-seconds / spent.seconds:.1%}" for seconds, part in most)
    starts = f"{len(spent.starts)} start{'s' if len(spent.starts) > 1 else ''}"
    return f"goodput {spent.goodput:.1%} of {spent.seconds:.0f} s in {starts}; the rest: {rest}"


def _plot(run: "Run", evaluate: object) -> None:
    """Draws what the evaluations found, for reports."""
    if evaluate is None or not run.config.telemetry.jsonl:
        return
    from tlite_jax.telemetry.board_plot import has_board, plot_board

    metrics = run.directory / "metrics.jsonl"
    if has_board(metrics):
        for suffix in ("png", "svg"):
            plot_board(metrics, run.directory / "evaluation" / f"board.{suffix}", str(run.directory))


def _ending(result: "Result") -> str:
    if result.stopped is not None:
        return result.stopped
    return "done" if result.signal is None else f"stopped by {signal.Signals(result.signal).name}; run again to go on"
