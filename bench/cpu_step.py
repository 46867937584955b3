"""Our training step against Hugging Face transformers + torch, side by side on this machine's CPU; docs/cpu_step.md.

    python bench/cpu_step.py                # the 135M model, about 10 minutes on 2 idle cores
    python bench/cpu_step.py --layers 4 --repeats 3
    python bench/cpu_step.py --parts        # also where our step's time goes

Same model (SmolLM2-135M's widths, random weights), same tokens, float32, AdamW and clipping in both; steps are taken
in turns (ours, torch eager, torch.compile, ours, ...) and medians compared, since machines are noisy. Each contender
lives in its own process, so that thread pools and memory are its own; only one works at a time. A turn counts when
the cores were free meanwhile: more turns are taken, for --minutes at most, until --repeats count.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import _cpu_report  # noqa: E402  (found through the line above)
from bench._cpu_report import Turn  # noqa: E402

NAMES = {"ours": "ours", "eager": "torch eager", "compile": "torch.compile"}


def main() -> None:
    """Runs the contenders in turns and prints what they took, as tables and as one line of JSON."""
    options = _options()
    deadline = time.monotonic() + 60 * options.minutes
    names = [name for name in NAMES if name != "compile" or not options.no_compile]
    contenders = {name: _Contender(name) for name in names}
    facts = {name: contender.ask("facts") for name, contender in contenders.items()}
    print(_cpu_report.machine(options.threads, facts["eager"]["blas"]), flush=True)
    first = {name: contender.ask("step") for name, contender in contenders.items()}
    for name, answer in first.items():
        print(f"{name}: first step, with compiling, {answer['seconds']:.1f} s, loss {answer['loss']:.5f}", flush=True)
    turns = _take_turns(options, contenders, deadline)
    memory = {name: contender.ask("memory")["bytes"] for name, contender in contenders.items()}
    tokens = options.batch * options.sequence
    shape = f"{options.layers} layers, {options.batch} x {options.sequence} tokens, {options.threads} threads, float32"
    print(f"\n{shape}; load {os.getloadavg()[0]:.2f} at the end", flush=True)
    rows = _cpu_report.rows(turns, memory, tokens, facts["ours"]["flops_per_token"])
    print(_cpu_report.table(rows, NAMES), flush=True)
    print(_cpu_report.counted(turns, options.repeats))
    summary: dict[str, Any] = {"rows": rows, "turns": len(turns), "quiet": sum(turn.quiet for turn in turns)}
    if options.parts:
        summary["parts"] = contenders["ours"].ask("parts")
        print(f"\n{_cpu_report.parts_table(summary['parts'])}")
    for contender in contenders.values():
        contender.close()
    print(json.dumps(summary))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7, help="turns that are to count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=15, help="after these no further turn is begun")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--parts", action="store_true", help="measure the parts of our step, a minute more")
    return parser.parse_args()


def _take_turns(options: argparse.Namespace, contenders: dict[str, "_Contender"], deadline: float) -> list[Turn]:
    """At least one turn, then more until enough were quiet or the time is up."""
    turns: list[Turn] = []
    while sum(turn.quiet for turn in turns) < options.repeats and (not turns or time.monotonic() < deadline):
        before, own, start = _cpu_report.busy_seconds(), 0.0, time.perf_counter()
        steps, rates = {}, {}
        for name, contender in contenders.items():
            steps[name] = contender.ask("step")
            rates[name] = contender.ask("matmul")
            own += steps[name]["cpu_seconds"] + rates[name]["cpu_seconds"]
        after, missing = _cpu_report.busy_seconds(), None
        if before is not None and after is not None:
            others_cores = (after - before - own) / (time.perf_counter() - start)
            missing = _cpu_report.missing_share(others_cores, options.threads, os.cpu_count() or 1)
        turns.append(Turn(steps, {name: rate["flops"] for name, rate in rates.items()}, missing))
        line = ", ".join(f"{name} {step['seconds']:.2f} s" for name, step in steps.items())
        print(f"turn {len(turns)}: {line}" + ("" if missing is None else f"; cores missing {missing:.0%}"), flush=True)
    return turns


class _Contender:
    """A process that takes a step when asked."""

    def __init__(self, name: str):
        command = [sys.executable, "-m", "bench._cpu_worker", name, *sys.argv[1:]]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to facts, step, matmul, memory or parts; see `_cpu_worker`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a contender ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    main()
