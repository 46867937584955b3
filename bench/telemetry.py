"""What writing metrics costs the training thread, in microseconds a logged step.

    python bench/telemetry.py --steps 2000 --repeats 9

As many metrics as a run logs go to each sink and to all of them at once, a pause between steps as training has one,
so that the sinks' own threads run as they do there; the variants take turns. `readings` is what data wait and memory
cost to ask for. A run of 100 ms a step may spend 500 microseconds.
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

from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter, Sink, TensorBoardSink
from tlite_jax.telemetry.prometheus import PrometheusSink
from tlite_jax.telemetry.resources import Resources

_NAMES = (
    *("loss", "gradient_norm", "learning_rate", "tokens_seen", "step_seconds", "tokens_per_second", "mfu"),
    *("mfu_causal", "data_wait_seconds", "device_peak_bytes", "host_memory_bytes"),
)
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
        variants = _variants(Path(scratch))
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
    total = _mean(rounds["all"]) + _mean(rounds["readings"])
    print(f"all and readings: {total:.0f} of {_LIMIT_MICROSECONDS} microseconds")
    sys.exit(total > _LIMIT_MICROSECONDS)


def _mean(times: list[list[float]]) -> float:
    return statistics.median(map(statistics.mean, times))


def _variants(scratch: Path) -> dict[str, Callable[[], tuple[Callable[[int], object], Callable[[], None]]]]:
    """Name -> makes (what a step calls, what ends it)."""
    makers: dict[str, Callable[[], Sink]] = {
        "jsonl": lambda: JsonlSink(scratch / "metrics.jsonl"),
        "tensorboard": lambda: TensorBoardSink(scratch / "tensorboard"),
        "prometheus": lambda: PrometheusSink(scratch / "run.prom", "bench"),
    }

    def sinks(*names: str) -> Callable[[], tuple[Callable[[int], object], Callable[[], None]]]:
        def start() -> tuple[Callable[[int], object], Callable[[], None]]:
            writer = MetricsWriter([makers[name]() for name in names])
            return lambda step: writer.write(step, dict.fromkeys(_NAMES, step / 7)), writer.close

        return start

    def readings() -> tuple[Callable[[int], object], Callable[[], None]]:
        resources = Resources(jax.local_devices(), every=1, last=0, step=0)
        return lambda step: resources.read(step, float(step)), lambda: None

    return {name: sinks(name) for name in makers} | {"all": sinks(*makers), "readings": readings}


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
