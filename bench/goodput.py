"""Goodput of the 8B run by simulation, at 96 and 1,024 GPUs: `python bench/goodput.py [--seed 0] [--days 100000]`.

Every assumption is printed. Nothing here is measured on a cluster.
"""

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

STATE_BYTES = 8_030_261_248 * 12  # Llama-3-8B: float32 weights and two moments
DAY = 86_400.0


@dataclass(frozen=True)
class Assumptions:
    """Seconds, unless named otherwise."""

    gpus: int
    days_between_failures_at_96: float = 3.75  # Meta's study of A100 clusters, arXiv 2410.21680: 3.5 to 4
    hang_share: float = 0.1  # of failures: alive but stuck; ours
    interval: float = 600.0
    blocking: float = 2.0
    storage_bytes_per_second: float = 5e9
    heartbeat: float = 15.0
    watchdog: float = 300.0  # watchdog.step_floor
    requeue: float = 120.0  # Slurm's wait before a requeued job starts
    start: float = 90.0  # processes, imports, joining, opening the run
    compile: float = 60.0  # from the compilation cache

    @property
    def mean_time(self) -> float:
        """Between failures."""
        return self.days_between_failures_at_96 * DAY * 96 / self.gpus

    @property
    def transfer(self) -> float:
        """One write, or one verified read, of the state."""
        return STATE_BYTES / self.storage_bytes_per_second

    @property
    def recovery(self) -> float:
        """From a failure to the first step after it, without the work that is done again; on average."""
        detection = (1 - self.hang_share) * self.heartbeat + self.hang_share * self.watchdog
        return detection + self.requeue + self.start + self.transfer + self.compile


def simulate(assumed: Assumptions, seed: int, days: float) -> float:
    """Share of the time that computed steps which count, over so many days of failures at random moments."""
    random_numbers = random.Random(seed)
    cycle = assumed.interval + assumed.blocking
    total, useful = 0.0, 0.0
    while total < days * DAY:
        until = random_numbers.expovariate(1 / assumed.mean_time)  # restarts fail as well
        hang = random_numbers.random() < assumed.hang_share
        down = assumed.watchdog if hang else assumed.heartbeat
        restart = assumed.requeue + assumed.start + assumed.transfer + assumed.compile
        total += until + down
        # A save counts once it is written, after the steps have gone on.
        saves = math.floor(max(0.0, until - restart - assumed.transfer) / cycle)
        useful += saves * assumed.interval
    return useful / total


def estimate(assumed: Assumptions) -> float:
    """First-order Young/Daly: blocking each interval; half an interval, a write and a recovery each failure."""
    lost = assumed.interval / 2 + assumed.transfer + assumed.recovery
    return 1 - assumed.blocking / (assumed.interval + assumed.blocking) - lost / assumed.mean_time


def best_interval(assumed: Assumptions) -> float:
    """Young's: sqrt(2 blocking mean_time)."""
    return math.sqrt(2 * assumed.blocking * assumed.mean_time)


def report(seed: int, days: float, show: Callable[[str], object] = print) -> None:
    """Prints the assumptions and, for each size, goodput over intervals."""
    for gpus in (96, 1024):
        base = Assumptions(gpus)
        show(f"{base}")
        show(
            f"state {STATE_BYTES / 1e9:.1f} GB, transfer {base.transfer:.1f} s, recovery {base.recovery:.0f} s, "
            f"a failure every {base.mean_time / 3600:.1f} h; Young's interval {best_interval(base):.0f} s"
        )
        show(f"{'GPUs':>5} {'interval':>8} {'simulated':>9} {'estimate':>8}")
        for interval in (120.0, 300.0, 600.0, 900.0, 1200.0, 1800.0, 3600.0):
            assumed = replace(base, interval=interval)
            simulated = simulate(assumed, seed, days)
            show(f"{gpus:>5} {interval:>6.0f} s {simulated:>9.2%} {estimate(assumed):>8.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--days", type=float, default=100_000.0, help="simulated, for each line")
    arguments = parser.parse_args()
    report(arguments.seed, arguments.days)
