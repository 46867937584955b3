"""Every fault in its full form, one after the other, and a table at the end: `make test-faults`.

TLITE_FAULTS=0.1 runs a tenth of the repetitions; words name faults: `python -m tests.faults kills flips`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.faults import disk, network, report

SEED = "1"
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
      runs: how often it was to be tried.
      passed: None where it was not tried.
      told: by the tries that went well.
      reason: why it was not tried.
    """

    fault: Fault
    runs: int
    passed: bool | None
    seconds: float
    told: tuple[report.Told, ...] = ()
    reason: str = ""

    @property
    def seed(self) -> str:
        return "" if self.passed is None or _is_pytest(self.fault) else SEED


FAULTS = (
    Fault("kills", "SIGKILL while training or saving", 300, ("-m", "tests.faults.kills", "--count", "{}")),
    Fault("local", "the same with a local disk", 100, ("-m", "tests.faults.kills", "--local", "--count", "{}")),
    Fault("flips", "a flipped bit", 1000, ("-m", "tests.faults.flips", "--flips", "{}", "--cuts", "0")),
    Fault("cuts", "a truncated file", 200, ("-m", "tests.faults.flips", "--flips", "0", "--cuts", "{}")),
    Fault(
        "disk", "a disk that fills up while training", 50, ("-m", "tests.faults.disk", "--count", "{}"), disk.why_not
    ),
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
        return Result(fault, 0, None, 0.0, reason=reason)
    runs = max(1, round(fault.runs * scale))
    print(f"\n{fault.name}: {fault.what}, {runs} times", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tlite-told-") as scratch:
        told = Path(scratch) / "told"
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "TLITE_KILLS": str(runs)}
        environment |= {} if _is_pytest(fault) else {report.FILE: str(told)}
        words = [sys.executable, *_arguments(fault, runs, told)]
        passed = subprocess.run(words, env=environment).returncode == 0
        found = report.read_tests(told) if _is_pytest(fault) else report.read(told)
    return Result(fault, runs, passed, time.monotonic() - began, tuple(found))


def _arguments(fault: Fault, runs: int, told: Path) -> list[str]:
    words = [word.format(runs) for word in fault.arguments]
    if _is_pytest(fault):
        return [*words, f"--junitxml={told}"]
    if "tests.faults.kills" in words:
        os.makedirs("runs", exist_ok=True)
        words += ["--log", f"runs/{fault.name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"]
    return [*words, "--seed", SEED] if fault.arguments[0] == "-m" else words


def _is_pytest(fault: Fault) -> bool:
    return fault.arguments[: len(PYTEST)] == PYTEST


def summary(results: list[Result], scale: float) -> str:
    """A table of all, and a line that says how it went; the worst time is that which came nearest to its limit."""
    words = {True: "passed", False: "FAILED", None: "skipped"}
    rows = [("fault", "what", "count", "result", "worst s", "limit s", "seed", "took s", "")]
    for result in results:
        fault, single = result.fault, result.told[0] if len(result.told) == 1 else None
        count = _tests_or_runs(result)
        end = (result.seed, f"{result.seconds:.0f}", result.reason or (single.note if single else ""))
        rows.append((fault.name, fault.what, count, words[result.passed], *_times(single), *end))
        if single is None:
            rows += [("", told.kind, str(told.count), "", *_times(told), "", "", told.note) for told in result.told]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = {passed: sum(result.passed is passed for result in results) for passed in words}
    minutes = sum(result.seconds for result in results) / 60
    lines.append(
        f"{count[True]} passed, {count[False]} failed, {count[None]} skipped in {minutes:.0f} minutes, "
        f"at {scale:g} of the full repetitions"
    )
    return "\n".join(lines)


def _tests_or_runs(result: Result) -> str:
    return str(result.told[0].count if _is_pytest(result.fault) and result.told else result.runs)


def _times(told: report.Told | None) -> tuple[str, str]:
    if told is None or told.worst is None or told.limit is None:
        return "", ""
    return f"{told.worst:.1f}", f"{told.limit:.1f}"


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
