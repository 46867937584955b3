"""A plan as a JSON value and as text: the same numbers, priced by `plan.cost`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tlite_jax.config import RunConfig
from tlite_jax.plan.cost import Cost, Transfer
from tlite_jax.plan.program import Program
from tlite_jax.plan.search import Candidate
from tlite_jax.plan.topology import Domain, Hardware
from tlite_jax.telemetry.throughput import num_parameters

GIB = 2**30
# Tables are cut to a terminal's width; where there is none, nothing is cut.
WIDTH_OF_A_FILE = 160
_RATES = ("matmul", "attention_forward", "attention_backward", "memory", "intra_node", "inter_node")


@dataclass(frozen=True)
class Plan:
    """Everything that a report says."""

    config: RunConfig
    hardware: Hardware
    nodes: int
    domain: Domain
    program: Program
    cost: Cost
    on_cpu: bool
    price: float | None

    @property
    def mesh(self) -> tuple[int, int]:
        """(replica, fsdp)."""
        mesh = self.config.mesh
        return mesh.replica, mesh.fsdp or self.domain.num_devices // (mesh.replica * mesh.context)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as a value for json.dumps; docs/plan.md says what each key means."""
    program, cost, fit = plan.program, plan.cost, plan.cost.fit
    assert plan.config.model is not None
    return {
        "hardware": plan.hardware.title,
        "nodes": plan.nodes,
        "devices": plan.domain.num_devices,
        "mesh": {"replica": plan.mesh[0], "fsdp": plan.mesh[1], "context": plan.config.mesh.context},
        "num_microbatches": program.num_microbatches,
        "upper_bound": plan.on_cpu,
        "parameters": num_parameters(plan.config.model),
        "fits": fit.fits,
        "memory": {
            **asdict(program.memory),
            "unseen_bytes": fit.unseen_bytes,
            "unseen": dict(plan.hardware.unseen_memory_bytes),
            "headroom_bytes": fit.headroom_bytes,
            "needed_bytes": fit.needed_bytes,
            "capacity_bytes": fit.capacity_bytes,
        },
        "work": asdict(program.work),
        "flop_ratio": cost.flop_ratio,
        "fp8_share": plan.program.work.fp8_flops / (plan.program.work.matmul_flops or 1.0),
        "wire_ratio": cost.wire_ratio,
        "hidden_share": dict(cost.hidden_share),
        "memory_ratio": cost.memory_ratio,
        "step_seconds": cost.step_seconds,
        "seconds": dict(cost.terms),
        "transfer_seconds": dict(cost.transfer_seconds),
        "tokens_per_second_per_device": cost.tokens_per_second_per_device,
        "tokens_per_second": cost.tokens_per_second_per_device * program.num_devices,
        "mfu": cost.mfu,
        "mfu_causal": cost.mfu_causal,
        "collectives": summarize(cost.transfers),
        "instructions": [_instruction(each) for each in cost.transfers],
        "steps": cost.steps,
        "days": cost.days,
        "dollars": cost.dollars,
        "violations": list(program.violations),
        "compile_seconds": program.compile_seconds,
        "assumptions": assumptions(plan),
    }


def summarize(transfers: Iterable[Transfer]) -> list[dict[str, Any]]:
    """Collectives of a step by where they are, kind, dtype and group; the longest first.

    Returns:
      For each: kind, dtype, group, where, count (executions in a step), bytes (that one device sends in a step),
      seconds (of a step, hidden ones included), hidden_share (in time) and overlaps (whether any of it does).
    """
    groups: dict[tuple[str, str, str, str], list[Transfer]] = {}
    for each in transfers:
        of = each.collective
        groups.setdefault((of.kind, of.dtype, each.group, of.where), []).append(each)
    rows = []
    for (kind, dtype, group, where), members in groups.items():
        seconds = sum(each.collective.count * each.seconds for each in members)
        hidden = sum(each.collective.count * each.hidden_seconds for each in members)
        rows.append(
            {
                "kind": kind,
                "dtype": dtype,
                "group": group,
                "where": where,
                "count": sum(each.collective.count for each in members),
                "bytes": sum(each.collective.count * each.collective.wire_bytes for each in members),
                "seconds": seconds,
                "hidden_share": hidden / seconds if seconds else 1.0,
                "overlaps": hidden > 0,
            }
        )
    return sorted(rows, key=lambda row: -float(row["seconds"]))


def assumptions(plan: Plan) -> list[str]:
    """Where each number that was not computed comes from."""
    hardware = plan.hardware
    lines = [f"peak {hardware.peak_flops.value:.4g} FLOP/s: {hardware.peak_flops.source}"]
    for name in _RATES if plan.program.work.fp8_flops == 0 else (*_RATES, "matmul_fp8"):
        rate = getattr(hardware.rates, name) or hardware.rates.matmul
        unit = "bytes/s" if name in ("memory", "intra_node", "inter_node") else "FLOP/s"
        lines.append(f"{name} {rate.value:.4g} {unit}: {rate.source}")
    if plan.cost.dollars is not None:
        price = hardware.price
        source = f"{plan.price:g}: --price" if plan.price or price is None else f"{price.dollars_per_device_hour:g}: "
        lines.append(f"dollars a device-hour {source}{'' if plan.price or price is None else price.source}")
    if plan.config.execution.compute_dtype != "bfloat16" and hardware.kind != "cpu":
        lines.append("the rates are of bf16; this config computes in float32, which is slower by 2 to 16 times")
    if plan.on_cpu:
        lines.append(
            "compiled for CPU devices, not for this hardware: memory is an upper bound, bf16 collectives count as "
            "float32, and nothing is seen to overlap"
        )
    return lines


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the tables of a plan."""
    program, cost = plan.program, plan.cost
    replica, fsdp = plan.mesh
    context = plan.config.mesh.context
    shared = f" x context {context}" if context > 1 else ""
    slices = f" ({plan.domain.num_domains} x {plan.domain.name})" if plan.hardware.kind == "tpu" else ""
    bound = ", compiled for CPU devices: an upper bound" if plan.on_cpu else ""
    console.print(
        f"{plan.hardware.title}: {plan.nodes} nodes{slices}, {plan.domain.num_devices} devices, "
        f"replica {replica} x fsdp {fsdp}{shared}, {program.num_microbatches} microbatches of "
        f"{program.tokens_per_device // program.num_microbatches:,} tokens a device{bound}",
        highlight=False,
    )
    console.print(_memory_table(plan))
    if cost.transfers:
        console.print(_collectives_table(cost))
    console.print(_time_table(cost))
    for line in _summary(plan):
        console.print(line, highlight=False, markup=False)


def print_search(found: Sequence[Candidate], console: Console, most: int = 20) -> None:
    """Prints the variants that fit, the fastest first."""
    table = _table(
        ("mesh", "remat"), ("microbatches", "sequences", "GiB", "step s", "tok/s/device", "mfu", "mfu_causal")
    )
    for each in found[:most]:
        mesh, cost = each.config.mesh, each.cost
        table.add_row(
            f"{mesh.replica} x {mesh.fsdp}",
            each.config.execution.remat,
            str(each.program.num_microbatches),
            str(each.sequences),
            _gib(cost.fit.needed_bytes),
            f"{cost.step_seconds:.3f}",
            f"{cost.tokens_per_second_per_device:,.0f}",
            f"{cost.mfu:.3f}",
            f"{cost.mfu_causal:.3f}",
        )
    console.print(table)


def candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    """A variant of a search, or a remedy."""
    cost = candidate.cost
    return {
        "overrides": list(candidate.words),
        "num_devices": candidate.program.num_devices,
        "fits": cost.fit.fits,
        "needed_bytes": cost.fit.needed_bytes,
        "step_seconds": cost.step_seconds,
        "tokens_per_second_per_device": cost.tokens_per_second_per_device,
        "mfu": cost.mfu,
        "mfu_causal": cost.mfu_causal,
        "days": cost.days,
        "dollars": cost.dollars,
    }


def shortfall(cost: Cost) -> str:
    """By how much a plan does not fit."""
    fit = cost.fit
    return (
        f"does not fit: needs {_gib(fit.needed_bytes)} GiB (step {_gib(fit.peak_bytes)}, unseen "
        f"{_gib(fit.unseen_bytes)}, headroom {_gib(fit.headroom_bytes)}) of {_gib(fit.capacity_bytes)}, "
        f"{_gib(fit.needed_bytes - fit.capacity_bytes)} too many"
    )


def console_for(*, stderr: bool = False) -> Console:
    """A console that cuts nothing where there is no terminal."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    return console


def _instruction(each: Transfer) -> dict[str, Any]:
    return {**asdict(each.collective), "seconds": each.seconds, "hidden_seconds": each.hidden_seconds}


def _memory_table(plan: Plan) -> Table:
    memory, fit = plan.program.memory, plan.cost.fit
    table = _table(("memory of a device",), ("GiB",))
    rows = [
        ("parameters", memory.parameters_bytes),
        ("optimizer", memory.optimizer_bytes),
        ("arguments: state and batch", memory.arguments_bytes),
        ("gradients", memory.gradients_bytes),
        ("temporaries, gradients included", memory.temporaries_bytes),
        ("peak of the step", fit.peak_bytes),
        *((f"unseen: {name}", size) for name, size in plan.hardware.unseen_memory_bytes.items()),
        ("headroom", fit.headroom_bytes),
    ]
    for name, size in rows:
        table.add_row(name, _gib(size))
    table.add_section()
    table.add_row("needed (peak, unseen, headroom)", _gib(fit.needed_bytes))
    table.add_row("capacity", _gib(fit.capacity_bytes))
    return table


def _collectives_table(cost: Cost) -> Table:
    table = _table(("collective", "dtype", "group", "where"), ("count", "GB a step", "seconds", "hidden"))
    for row in summarize(cost.transfers):
        names = (row["kind"], row["dtype"], row["group"], row["where"])
        table.add_row(
            *names,
            f"{row['count']:,}",
            f"{row['bytes'] / 1e9:.3f}",
            f"{row['seconds']:.4f}",
            f"{row['hidden_share']:.0%}",
        )
    return table


def _time_table(cost: Cost) -> Table:
    table = _table(("time of a step",), ("seconds", "share"))
    for name, seconds in cost.terms.items():
        table.add_row(name.replace("_", " "), f"{seconds:.4f}", f"{seconds / cost.step_seconds:.1%}")
    table.add_section()
    table.add_row("step", f"{cost.step_seconds:.4f}", "100%")
    return table


def _summary(plan: Plan) -> Iterator[str]:
    cost, work = plan.cost, plan.program.work
    hidden = cost.hidden_share
    eight_bits = f" ({work.fp8_flops / 1e12:,.1f} in eight bits)" if work.fp8_flops else ""
    yield (
        f"executed {(work.matmul_flops + work.attention_flops) / 1e12:,.1f} TFLOP a device and step{eight_bits}, "
        f"needed {work.needed_flops / 1e12:,.1f}: flop_ratio {cost.flop_ratio:.3f}, wire_ratio {cost.wire_ratio:.3f}, "
        f"memory_ratio {cost.memory_ratio:.3f}"
    )
    yield f"hidden_share: loop {hidden['loop']:.2f}, edges {hidden['edges']:.2f}, replica {hidden['replica']:.2f}"
    yield (
        f"{cost.tokens_per_second_per_device:,.0f} tokens/s/device, mfu {cost.mfu:.3f}, "
        f"mfu_causal {cost.mfu_causal:.3f} (a roofline: a real run is slower)"
    )
    if cost.steps is None:
        yield "days and cost: unknown until the buckets are counted; set train.steps or data.mixture.tokens"
    else:
        price = "cost unknown, give --price" if cost.dollars is None else f"{cost.dollars:,.0f} dollars"
        yield f"{cost.steps:,} steps, {cost.days:.1f} days, {price}"
    yield from (f"assumes {line}" for line in assumptions(plan))


def _table(left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
