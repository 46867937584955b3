"""What writing metrics costs the training thread, in microseconds a logged step.

    python bench/telemetry.py --steps 2000 --repeats 9

As many metrics as T-lite's first stage logs, losses of 23 buckets and every 50th step 57 norms among them, go to each
sink and to all of them at once, a pause between steps as training has one, so that the sinks' own threads run as they
do there; the variants take turns. The trackers' processes take what they are given and do nothing with it. `readings`
is what data wait and memory cost to ask for, `parts` what it costs to make losses by bucket of those of 768 rows, and
norms of an array, `pace` what comparing this process's pace with the others' costs around a step that does nothing.
A run of 100 ms a step may spend 500 microseconds.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from launch.job.pace import PaceWatch
from launch.job.peers import JobBoard
from tlite_jax.config import WatchdogConfig
from tlite_jax.config_files import load_config
from tlite_jax.data.order import Plan, PlannedBucket
from tlite_jax.data.segments import Segment, Timeline
from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter, Sink, TensorBoardSink
from tlite_jax.telemetry.prometheus import PrometheusSink
from tlite_jax.telemetry.resources import Resources
from tlite_jax.telemetry.trackers.sink import TrackerSink
from tlite_jax.train.bucket_losses import bucket_losses
from tlite_jax.train.norms import KINDS, group_names, named_norms

_CONFIG = load_config(Path(__file__).resolve().parent.parent / "configs" / "tlite_8b_stage1.yaml")
assert _CONFIG.model is not None
_MODEL, _ROWS = _CONFIG.model, _CONFIG.train.batch_size
_BUCKETS = tuple(f"source{number}.ru.style{number}.topic" for number in range(len(_CONFIG.data.declared)))
_NAMES = (
    *("loss", "gradient_norm", "learning_rate", "tokens_seen", "step_seconds", "tokens_per_second", "mfu"),
    *("mfu_causal", "data_wait_seconds", "device_peak_bytes", "host_memory_bytes"),
    *(f"bucket_loss/{name}" for name in _BUCKETS),
)
_NORMS = tuple(named_norms(_MODEL, np.ones((len(KINDS), len(group_names(_MODEL))))))
_EVERY = _CONFIG.telemetry.norms_every
_SILENT_TRACKER = "import sys\nfor line in sys.stdin: print('{\"url\": null}', flush=True)"
_LIMIT_MICROSECONDS = 500


def main() -> None:
    """Prints a table; exit status 1 when all sinks together cost more than they may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="in each round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each variant")
    parser.add_argument("--pause", type=float, default=0.001, help="seconds between two steps")
    parser.add_argument("--scratch", type=Path, help="a directory on the disk to measure; default: the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        variants = _variants(Path(scratch), options.steps)
        rounds: dict[str, list[list[float]]] = {name: [] for name in variants}
        for _ in range(options.repeats):
            for name, (write, close) in {name: start() for name, start in variants.items()}.items():
                rounds[name].append(_microseconds(write, options.steps, options.pause))
                close()
    print(f"{options.repeats} rounds of {options.steps} steps, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("| what | mean, median round | 99th percentile, median round |\n|---|---|---|")
    for name, times in rounds.items():
        slow = statistics.median(statistics.quantiles(each, n=100)[98] for each in times)
        print(f"| {name} | {_mean(times):.0f} | {slow:.0f} |")
    total = sum(_mean(rounds[name]) for name in ("all", "readings", "parts", "pace"))
    print(f"all, readings, parts and pace: {total:.0f} of {_LIMIT_MICROSECONDS} microseconds")
    sys.exit(total > _LIMIT_MICROSECONDS)


def _mean(times: list[list[float]]) -> float:
    return statistics.median(map(statistics.mean, times))


def _variants(scratch: Path, steps: int) -> dict[str, Callable[[], tuple[Callable[[int], object], Callable[[], None]]]]:
    """Name -> makes (what a step calls, what ends it)."""
    makers: dict[str, Callable[[], Sink]] = {
        "jsonl": lambda: JsonlSink(scratch / "metrics.jsonl"),
        "tensorboard": lambda: TensorBoardSink(scratch / "tensorboard"),
        "prometheus": lambda: PrometheusSink(scratch / "run.prom", "bench"),
        "wandb": lambda: _tracker("wandb"),
        "mlflow": lambda: _tracker("mlflow"),
    }

    def sinks(*names: str) -> Callable[[], tuple[Callable[[int], object], Callable[[], None]]]:
        def start() -> tuple[Callable[[int], object], Callable[[], None]]:
            writer = MetricsWriter([makers[name]() for name in names])

            def write(step: int) -> None:
                names = _NAMES if step % _EVERY else (*_NAMES, *_NORMS)
                writer.write(step, dict.fromkeys(names, step / 7))

            return write, writer.close

        return start

    def readings() -> tuple[Callable[[int], object], Callable[[], None]]:
        resources = Resources(jax.local_devices(), every=1, last=0, step=0)
        return lambda step: resources.read(step, float(step)), lambda: None

    def parts() -> tuple[Callable[[int], object], Callable[[], None]]:
        quota = 10 * (steps + 1) * _ROWS
        plan = Plan((tuple(PlannedBucket(name, {}, 1000, quota, "") for name in _BUCKETS),), 0, 8192)
        timeline = Timeline((Segment(0, plan.hash),), {plan.hash: plan})
        # An array that was read once gives its values again for nothing.
        rows = [jax.device_put(np.ones((_ROWS, 2), np.float32)) for _ in range(steps + 1)]
        norms = [jax.device_put(np.ones((len(KINDS), len(group_names(_MODEL))))) for _ in range(steps + 1)]

        def make(step: int) -> None:
            bucket_losses(timeline, (step - 1) * _ROWS, np.asarray(rows[step]))
            if step % _EVERY == 0:
                named_norms(_MODEL, np.asarray(norms[step]))

        return make, lambda: None

    def pace() -> tuple[Callable[[int], object], Callable[[], None]]:
        config = WatchdogConfig(pace_every=steps + 1)  # no comparison: 10 ms of it, once in 50 steps
        watch = PaceWatch(config, JobBoard(None), 0, 2, scratch / "stragglers.jsonl").start()
        loss = jax.device_put(np.float32(1.0))
        step_fn = watch.around(lambda state, batch: (state, {"loss": loss}), 0)
        return lambda step: step_fn(None, None), watch.close

    others = {"all": sinks(*makers), "readings": readings, "parts": parts, "pace": pace}
    return {name: sinks(name) for name in makers} | others


def _tracker(name: str) -> TrackerSink:
    return TrackerSink(name, [sys.executable, "-c", _SILENT_TRACKER], {}, total_steps=0, close_seconds=30.0)


def _microseconds(write: Callable[[int], object], steps: int, pause: float) -> list[float]:
    times = []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        write(step)
        times.append(1e6 * (time.perf_counter() - began))
        time.sleep(pause)
    return times


if __name__ == "__main__":
    main()
