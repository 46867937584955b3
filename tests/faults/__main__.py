"""Every fault in its full form, one after the other, and a table at the end: `make test-faults`.

TLITE_FAULTS=0.1 runs a tenth of the repetitions; words name faults: `python -m tests.faults kills flips`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.faults import network

PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=0", "--durations-min=1000")


class Fault(NamedTuple):
    """What goes wrong, how often in the full form, and the arguments of the Python that tries it; {} is how often.

    `why_not` says what this machine lacks for it, or None.
    """

    name: str
    what: str
    runs: int
    arguments: tuple[str, ...]
    why_not: Callable[[], str | None] = lambda: None


class Result(NamedTuple):
    """What came of it.

    Attributes:
      runs: how often it was tried.
      passed: None where it was not tried.
      reason: why not.
    """

    fault: Fault
    runs: int
    passed: bool | None
    seconds: float
    reason: str = ""


FAULTS = (
    Fault("kills", "SIGKILL while training or saving", 300, ("-m", "tests.faults.kills", "--count", "{}")),
    Fault("local", "the same with a local disk", 100, ("-m", "tests.faults.kills", "--local", "--count", "{}")),
    Fault("flips", "a flipped bit", 1000, ("-m", "tests.faults.flips", "--flips", "{}", "--cuts", "0")),
    Fault("cuts", "a truncated file", 200, ("-m", "tests.faults.flips", "--flips", "0", "--cuts", "{}")),
    Fault("disk", "a disk that fills up while training", 50, ("-m", "tests.faults.disk", "--count", "{}")),
    Fault("ranks", "SIGTERM to one of four processes", 50, ("-m", "tests.faults.ranks", "--count", "{}")),
    Fault("lost", "a process killed, stopped, stuck or absent", 20, ("-m", "tests.faults.lost", "--count", "{}")),
    Fault("slow", "a slow process", 3, ("-m", "tests.faults.slow", "--count", "{}")),
    Fault("network", "a network that is cut", 3, ("-m", "tests.faults.network", "--count", "{}"), network.why_not),
    Fault("spikes", "bad rows, two processes go back by themselves", 8, ("-m", "tests.faults.spikes", "--count", "{}")),
    Fault("models", "a spoiled model file", 20_000, ("-m", "tests.bridge.fuzzing", "--count", "{}")),
    Fault("prepare", "SIGKILL while preparing", 300, (*PYTEST, "tests/data/test_workers.py")),
    Fault("hostile", "hostile files, code in data", 1, (*PYTEST, "tests/bridge/test_hostile.py", "tests/faults")),
    Fault("changes", "a changed config, mixture, mesh or tokenizer", 1, (*PYTEST, "tests/train/test_run.py")),
    Fault("processes", "two processes, one told to stop or in error", 1, (*PYTEST, "tests/train/test_processes.py")),
)


def run(fault: Fault, scale: float) -> Result:
    """Tries it, or says why it cannot be tried here."""
    if (reason := fault.why_not()) is not None:
        print(f"\n{fault.name}: skipped: {reason}", flush=True)
        return Result(fault, 0, None, 0.0, reason)
    runs = max(1, round(fault.runs * scale))
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "TLITE_KILLS": str(runs)}
    os.makedirs("runs", exist_ok=True)
    log = f"runs/{fault.name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    words = [word.format(runs) for word in fault.arguments]
    words += ["--log", log] if "tests.faults.kills" in words else []
    print(f"\n{fault.name}: {fault.what}, {runs} times", flush=True)
    began = time.monotonic()
    passed = subprocess.run([sys.executable, *words], env=environment).returncode == 0
    return Result(fault, runs, passed, time.monotonic() - began)


def summary(results: list[Result], scale: float) -> str:
    """A table of all, and a line that says how it went."""
    lines = [f"{'fault':<10}{'what':<48}{'runs':>6}  {'result':<8}{'seconds':>8}"]
    words = {True: "passed", False: "FAILED", None: "skipped"}
    for fault, runs, passed, seconds, reason in results:
        line = f"{fault.name:<10}{fault.what:<48}{runs:>6}  {words[passed]:<8}{seconds:>8.0f}"
        lines.append(f"{line}  {reason}".rstrip())
    count = {passed: sum(result.passed is passed for result in results) for passed in words}
    minutes = sum(result.seconds for result in results) / 60
    lines.append(
        f"{count[True]} passed, {count[False]} failed, {count[None]} skipped in {minutes:.0f} minutes, "
        f"at {scale:g} of the full repetitions"
    )
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Runs the named faults, or all, and prints the table; ends with 1 when one has failed."""
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in FAULTS)}")
    scale = float(os.environ.get("TLITE_FAULTS", "1"))
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    results = [run(fault, scale) for fault in chosen]
    print(f"\n{summary(results, scale)}")
    raise SystemExit(any(result.passed is False for result in results))


if __name__ == "__main__":
    main(sys.argv[1:])
