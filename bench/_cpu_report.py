"""What is made of the CPU benchmark's numbers: which turns count, the tables, the machine's description."""

import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.1  # of the cores that a contender needs, missing because others use them: a turn with less counts


@dataclass(frozen=True)
class Turn:
    """One step of every contender, one after the other.

    Attributes:
      steps: by contender: seconds, cpu_seconds, loss.
      rates: by contender, FLOP/s of its own product of matrices, measured right after its step.
      missing: the share of the cores needed that others used (processes, or machines on the same hardware); None: not
        known.
    """

    steps: Mapping[str, Mapping[str, float]]
    rates: Mapping[str, float]
    missing: float | None

    @property
    def quiet(self) -> bool:
        """Whether it counts."""
        return self.missing is None or self.missing < QUIET


def busy_seconds() -> float | None:
    """What all cores together have worked since the machine started, stolen time included; None but on Linux."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def missing_share(others_cores: float, threads: int, cores: int) -> float:
    """The share of the cores needed by `threads` that were not free while others kept `others_cores` busy."""
    return min(max(0.0, others_cores - max(0, cores - threads)) / min(threads, cores), 1.0)


def machine(threads: int, blas: str) -> str:
    """One line: the processor, torch's BLAS, threads, and how busy it is to begin with."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = found.group(1) if found else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {threads} threads used; torch: {blas}; load {os.getloadavg()[0]:.2f}"


def rows(
    turns: Sequence[Turn], memory: Mapping[str, int], tokens: int, flops_per_token: float
) -> dict[str, dict[str, float]]:
    """By contender, the medians of the turns that count; of all turns when none does.

    Args:
      turns: in the order in which they were taken; every one has `ours`.
      memory: bytes that each contender's process held at most.
      tokens: of a step.
      flops_per_token: needed FLOPs a token.
    """
    counting = [turn for turn in turns if turn.quiet] or list(turns)
    result = {}
    for name in turns[0].steps:
        seconds = statistics.median(turn.steps[name]["seconds"] for turn in counting)
        rate = statistics.median(turn.rates[name] for turn in counting)
        result[name] = {
            "tokens_per_second": tokens / seconds,
            # Ratios of neighbours in time, so that a slow minute counts for both.
            "ours_over_it": statistics.median(
                turn.steps[name]["seconds"] / turn.steps["ours"]["seconds"] for turn in counting
            ),
            "cpu_seconds": statistics.median(turn.steps[name]["cpu_seconds"] for turn in counting),
            # Of the rate in the same turn.
            "matmul_share": statistics.median(
                flops_per_token * tokens / turn.steps[name]["seconds"] / turn.rates[name] for turn in counting
            ),
            "matmul_flops": rate,
            "memory_bytes": memory[name],
            "loss": turns[-1].steps[name]["loss"],
        }
    return result


def table(contenders: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> str:
    """The rows in Markdown."""
    lines = [
        "| | tokens/s | ours / it | CPU s a step | share of its own matmul rate | matmul GFLOP/s | peak GB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in contenders.items():
        lines.append(
            f"| {names[name]} | {row['tokens_per_second']:.0f} | {row['ours_over_it']:.2f} | {row['cpu_seconds']:.2f} "
            f"| {row['matmul_share']:.0%} | {row['matmul_flops'] / 1e9:.0f} | {row['memory_bytes'] / 1e9:.2f} "
            f"| {row['loss']:.5f} |"
        )
    return "\n".join(lines)


def counted(turns: Sequence[Turn], wanted: int) -> str:
    """A sentence on how many turns the medians are of."""
    quiet = sum(turn.quiet for turn in turns)
    if quiet:
        return f"Medians of {quiet} turns of {len(turns)}" + (", fewer than asked for." if quiet < wanted else ".")
    return f"NONE of {len(turns)} turns was quiet: medians of all, not to be quoted. Run it on an idle machine."


def parts_table(parts: Mapping[str, float]) -> str:
    """CPU seconds of a step by part, in Markdown; what the parts leave of `step` is the loop's own."""
    named = {name: seconds for name, seconds in parts.items() if name != "step"}
    named["rest: stacks of the layer loop, page faults"] = parts["step"] - sum(named.values())
    lines = ["| part, compiled alone | CPU s a step | share |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.2f} | {seconds / parts['step']:.0%} |" for name, seconds in named.items()]
    return "\n".join([*lines, f"| step | {parts['step']:.2f} | 100% |"])
