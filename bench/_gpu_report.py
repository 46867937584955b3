"""From what the contenders measured to a table: the floor, the line over depths, agreement, shares of the peak."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench._ceilings import products
from bench._gpu_problem import Problem
from tlite_jax.config import ModelConfig
from tlite_jax.telemetry.throughput import flops_per_token, num_parameters

FITTED_LAYERS = 32
LARGEST_LINE_ERROR = 0.02  # of a depth between, before the table says that the line does not hold
ITEM_BYTES = {"bfloat16": 2, "float32": 4}


class Tolerance(NamedTuple):
    """Largest relative difference between contenders before the first update, and of the loss after it."""

    loss: float
    gradient_norm: float
    next_loss: float


# Both compute the same sums in another order: float32 agrees to 2e-7 on a CPU. In bfloat16 each rounds 65,536 losses
# at other places; the mean of such errors is far below one rounding (2^-9).
TOLERANCES = {"float32": Tolerance(1e-6, 3e-6, 1e-6), "bfloat16": Tolerance(2e-4, 5e-3, 5e-4)}


class DisagreementError(Exception):
    """The contenders do not compute the same thing, so their speeds cannot be compared."""


@dataclass
class Measured:
    """What one contender has reported, over all its turns so far."""

    version: str = ""
    device_kind: str = ""
    ceilings: list[dict[str, Any]] = field(default_factory=list)
    depths: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, message: Mapping[str, Any]) -> None:
        """Takes a message of `_gpu_problem.report`."""
        match message["event"]:
            case "start":
                self.version, self.device_kind = message["version"], message["device_kind"]
            case "ceilings":
                self.ceilings.append(dict(message))
            case "depth":
                self.depths[message["layers"]].append(dict(message))

    def seconds(self, layers: int) -> float:
        """Median of a step, over the timed steps of all turns."""
        return statistics.median(second for depth in self.depths[layers] for second in depth["seconds"])

    def update_seconds(self, layers: int) -> float:
        """Median of the update alone."""
        return statistics.median(depth["update_seconds"] for depth in self.depths[layers])

    def peak_bytes(self, layers: int) -> int:
        """The most memory that any turn took."""
        return max(depth["peak_bytes"] for depth in self.depths[layers])


class Ceilings(NamedTuple):
    """The best of both frameworks: FLOP/s of each product, seconds of attention for a sequence, copied bytes/s."""

    gemm: dict[str, float]
    attention: float
    copy: float


def best_ceilings(contenders: Mapping[str, Measured]) -> Ceilings:
    """Medians over turns, then the better framework."""
    gemm: dict[str, float] = {}
    attention: list[float] = []
    copies: list[float] = []
    for measured in contenders.values():
        for name in measured.ceilings[0]["gemm"]:
            rate = statistics.median(ceilings["gemm"][name] for ceilings in measured.ceilings)
            gemm[name] = max(gemm.get(name, 0.0), rate)
        attention += attention_seconds(measured).values()
        copies.append(statistics.median(ceilings["copy"] for ceilings in measured.ceilings))
    return Ceilings(gemm, min(attention), max(copies))


def attention_seconds(measured: Measured) -> dict[str, float]:
    """Kernel -> median seconds, forward and backward of one sequence."""
    names = measured.ceilings[0]["attention"]
    return {name: statistics.median(ceilings["attention"][name] for ceilings in measured.ceilings) for name in names}


def floor(problem: Problem, layers: int, ceilings: Ceilings) -> dict[str, float]:
    """The least time of a step, by term, in seconds; nothing overlaps, nothing is done twice.

    matmul: the needed products (forward, and two backward) at the measured rate of their own shapes. attention: as
    measured. elementwise: at the rate of a copy, every tensor that a fused pass reads or writes once (see
    `elementwise_bytes`), and three passes over the logits. update: the norm reads the gradient, AdamW reads four
    float32 arrays and writes three, and a compute copy is written. Sums of gradients over microbatches are left out: a
    product can add to its output.
    """
    model, item = problem.model(layers), ITEM_BYTES[problem.dtype]
    matmul = sum(
        product.flops(problem.tokens_per_step) * (product.per_layer * layers + product.once) / ceilings.gemm[name]
        for name, product in products(problem).items()
    )
    per_parameter = 4 + 28 + (item if problem.dtype != "float32" else 0)
    return {
        "matmul": matmul,
        "attention": layers * problem.microbatches * ceilings.attention,
        "elementwise": problem.tokens_per_step * elementwise_bytes(model, item) / ceilings.copy,
        "update": num_parameters(model) * per_parameter / ceilings.copy,
    }


def elementwise_bytes(model: ModelConfig, item: int) -> float:
    """Memory traffic of a token outside of products, attention and update, when every fused pass is as wide as it gets.

    A layer, forward: residual and norm (reads 2 D, writes 2 D) twice, rotation (q and k, in and out), SwiGLU (3 F).
    Backward: both norms' outputs computed again (5 D), their gradients with the residual's (8 D), rotation again and
    back, SwiGLU's output again with its gradient (6 F). The ends: embedding and final norm; the embedding's gradient
    is added to in float32. The loss: logits read twice (maximum and sum in one pass), their gradient written once.
    """
    D, F, V = model.hidden_size, model.intermediate_size, model.vocab_size
    rotated = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    layer = item * (21 * D + 6 * rotated + 9 * F)
    return model.num_hidden_layers * layer + item * 8 * D + 8 * D + item * 3 * V


class Line(NamedTuple):
    """fixed + layers x slope through the shallowest and the deepest; error: the worst relative miss between them."""

    fixed: float
    slope: float
    error: float | None

    def at(self, layers: int) -> float:
        """The line's value."""
        return self.fixed + layers * self.slope


def fit(values: Mapping[int, float]) -> Line | None:
    """The line over depths; None with fewer than two, no error with fewer than three."""
    if len(values) < 2:
        return None
    first, *between, last = sorted(values)
    slope = (values[last] - values[first]) / (last - first)
    line = Line(values[first] - first * slope, slope, None)
    misses = [abs(line.at(layers) / values[layers] - 1) for layers in between]
    return line._replace(error=max(misses, default=None))


def meaningless(step: Line, update: Line) -> str | None:
    """Why lines over depths say nothing of deeper models; None where they may: no layer takes less than no time."""
    for what, line in (("a step", step), ("the update", update)):
        if line.slope <= 0:
            return f"{what} of more layers was not slower ({line.slope:.2g} s a layer): noise is larger than the layers"
    if step.at(FITTED_LAYERS) <= update.at(FITTED_LAYERS):
        return "the update alone would take longer than the step: noise is larger than the layers"
    return None


def check_agreement(problem: Problem, ours: Measured, torch: Measured) -> list[str]:
    """Says of every depth that both have how far loss and gradient norm lie apart.

    Raises:
      DisagreementError: when they lie further apart than TOLERANCES has it.
    """
    tolerance = TOLERANCES[problem.dtype]
    lines = []
    for layers in sorted(set(ours.depths) & set(torch.depths)):
        mine, theirs = ours.depths[layers][0], torch.depths[layers][0]
        pairs = {
            "loss": (mine["losses"][0], theirs["losses"][0]),
            "gradient_norm": (mine["gradient_norm"], theirs["gradient_norm"]),
            "next_loss": (mine["losses"][1], theirs["losses"][1]),
        }
        for name, (a, b) in pairs.items():
            allowed = getattr(tolerance, name)
            apart = abs(a / b - 1)
            line = f"{layers} layers, {name}: ours {a:.7g}, torch {b:.7g}, apart {apart:.1e} (allowed {allowed:.0e})"
            if not apart <= allowed:  # also when it is not a number
                raise DisagreementError(f"the contenders do not agree: {line}")
            lines.append(line)
    if not lines:
        raise DisagreementError("no depth was measured by both, there is nothing to compare: give more --minutes")
    return lines


def rows(
    problem: Problem, contenders: Mapping[str, Measured], ceilings: Ceilings, peak: float | None
) -> list[dict[str, Any]]:
    """A row for every contender and depth, and one for the depth that the line is followed to."""
    result = []
    for name, measured in contenders.items():
        seconds = {layers: measured.seconds(layers) for layers in sorted(measured.depths)}
        updates = {layers: measured.update_seconds(layers) for layers in seconds}
        memory = {layers: measured.peak_bytes(layers) for layers in seconds}
        for layers in seconds:
            row = _row(problem, layers, (seconds[layers], updates[layers], memory[layers]), ceilings, peak)
            result.append({"contender": name, **row})
        step, update, peak_memory = fit(seconds), fit(updates), fit(memory)
        if step is not None and update is not None and peak_memory is not None:
            if reason := meaningless(step, update):
                result.append({"contender": name, "layers": FITTED_LAYERS, "not_meaningful": reason})
                continue
            values = (step.at(FITTED_LAYERS), update.at(FITTED_LAYERS), peak_memory.at(FITTED_LAYERS))
            row = _row(problem, FITTED_LAYERS, values, ceilings, peak)
            line = {"fixed_seconds": step.fixed, "layer_seconds": step.slope, "line_error": step.error}
            result.append({"contender": name, **row, **line})
    return result


def _row(
    problem: Problem, layers: int, values: tuple[float, float, float], ceilings: Ceilings, peak: float | None
) -> dict[str, Any]:
    """Of (seconds of a step, of the update alone, peak bytes)."""
    seconds, update, memory = values
    rate = problem.tokens_per_step / seconds
    flops = flops_per_token(problem.model(layers), problem.sequence)
    least = floor(problem, layers, ceilings)
    return {
        "layers": layers,
        "step_seconds": seconds,
        "update_seconds": update,
        "tokens_per_second": rate,
        "tokens_per_second_without_update": problem.tokens_per_step / (seconds - update) if update < seconds else None,
        "mfu": None if peak is None else rate * flops.mfu / peak,
        "mfu_causal": None if peak is None else rate * flops.mfu_causal / peak,
        "floor_seconds": sum(least.values()),
        "share_of_floor": sum(least.values()) / seconds,
        "peak_bytes": memory,
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| | layers | step s | update s | tok/s | tok/s without update | mfu | mfu_causal | share of floor | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if "not_meaningful" in row:
            lines.append(f"| {row['contender']} | {row['layers']} (fitted) |" + " - |" * 8)
            continue
        fitted = " (fitted)" if "line_error" in row else ""
        alone = row["tokens_per_second_without_update"]
        shares = " | ".join("-" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_causal"))
        lines.append(
            f"| {row['contender']} | {row['layers']}{fitted} | {row['step_seconds']:.4g} | {row['update_seconds']:.3g} "
            f"| {row['tokens_per_second']:,.0f} | {'-' if alone is None else f'{alone:,.0f}'} "
            f"| {shares} | {row['share_of_floor']:.1%} | {row['peak_bytes'] / 1e9:.2f} |"
        )
    lines += [
        f"{row['contender']}: fit not meaningful: {row['not_meaningful']}" for row in found if "not_meaningful" in row
    ]
    return "\n".join(lines)


def ceilings_table(problem: Problem, contenders: Mapping[str, Measured]) -> str:
    """The ceilings of each framework in Markdown, and the floor's terms for the deepest model."""
    best = best_ceilings(contenders)
    lines = [f"| ceiling | {' | '.join(contenders)} |", "|---|" + "---|" * len(contenders)]
    for name in products(problem):
        rates = [statistics.median(one["gemm"][name] for one in each.ceilings) for each in contenders.values()]
        lines.append(f"| {name}, TFLOP/s | {' | '.join(f'{rate / 1e12:.4g}' for rate in rates)} |")
    kernels = [
        ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in attention_seconds(each).items())
        for each in contenders.values()
    ]
    lines.append(f"| attention, forward and backward, ms | {' | '.join(kernels)} |")
    copies = [statistics.median(one["copy"] for one in each.ceilings) for each in contenders.values()]
    lines.append(f"| copy, read and written, GB/s | {' | '.join(f'{rate / 1e9:.4g}' for rate in copies)} |")
    terms = floor(problem, FITTED_LAYERS, best)
    per_token = {term: seconds / problem.tokens_per_step * 1e6 for term, seconds in terms.items()}
    parts = " + ".join(f"{term} {value:.3g}" for term, value in per_token.items())
    total = sum(per_token.values())
    lines.append(f"\nfloor of {FITTED_LAYERS} layers, us a token: {parts} = {total:.4g}, or {1e6 / total:,.0f} tok/s")
    return "\n".join(lines)
