"""From a compiled step to seconds and dollars: a roofline of stated rates, pure arithmetic.

    compute = matmul + attention + elementwise + optimizer         the device does one thing at a time
    step    = compute + exposed(loop) + exposed(edges) + exposed(replica)

A transfer hides behind the matrix products between its start and its end, as the compiled program has them in order;
what it does not hide is exposed. All transfers on one wire together hide behind no more than all matrix products of
the step, so that a step takes at least as long as either. Nothing is fitted to a measurement of a whole step: a real
one is slower by what no roofline has (launch gaps, stragglers, clocks, input).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tlite_jax.config import RunConfig
from tlite_jax.plan.program import Collective, Memory, Program, Where
from tlite_jax.plan.topology import Hardware, Rates
from tlite_jax.telemetry.throughput import flops_per_token

PLACES: Mapping[Where, str] = {"loop": "loop", "edge": "edges", "replica": "replica"}
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Transfer:
    """One execution of a collective, in seconds.

    Attributes:
      seconds: it takes.
      hidden_seconds: of these, behind the products between its start and its end.
      intra_seconds, inter_seconds: how long it keeps the device's link and the node's NICs busy.
    """

    collective: Collective
    seconds: float
    hidden_seconds: float
    intra_seconds: float
    inter_seconds: float

    @property
    def group(self) -> str:
        """Whether it leaves a node (on TPUs: a slice)."""
        return "inter-node" if self.collective.group_nodes > 1 else "intra-node"


@dataclass(frozen=True)
class Fit:
    """What the device must hold, and has. A plan fits when needed_bytes is at most capacity_bytes."""

    peak_bytes: int
    unseen_bytes: int
    headroom_bytes: int
    capacity_bytes: int

    @property
    def needed_bytes(self) -> int:
        """The compiled step, what no compiler sees, and the headroom."""
        return self.peak_bytes + self.unseen_bytes + self.headroom_bytes

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed_bytes <= self.capacity_bytes


@dataclass(frozen=True)
class Cost:
    """What a step and a run cost.

    Attributes:
      terms: term -> seconds of a step; they add up to step_seconds.
      transfer_seconds: place -> all transfers of a step, hidden ones included.
      hidden_share: place -> sum of min(transfer, products spanned) / sum of transfer; 1 where nothing is transferred.
      flop_ratio: executed / needed. wire_ratio: sent / unavoidable. memory_ratio: temporaries / expected.
      steps, days, dollars: of the config's token budget; None where it, or the price, is not known.
    """

    terms: Mapping[str, float]
    transfers: tuple[Transfer, ...]
    transfer_seconds: Mapping[str, float]
    hidden_share: Mapping[str, float]
    step_seconds: float
    tokens_per_second_per_device: float
    mfu: float
    mfu_causal: float
    flop_ratio: float
    wire_ratio: float
    memory_ratio: float
    fit: Fit
    steps: int | None
    days: float | None
    dollars: float | None


def estimate(
    program: Program, hardware: Hardware, config: RunConfig, *, nodes: int, headroom: float, price: float | None = None
) -> Cost:
    """Prices a compiled step on described hardware.

    Args:
      program: of one device; its num_nodes counts what `topology.domain` calls domains (nodes of GPUs, TPU slices).
      hardware: rates, memory and price.
      config: the run, its model known.
      nodes: hosts.
      headroom: fraction of the memory to leave free.
      price: dollars per device-hour, instead of the hardware's.
    """
    assert config.model is not None
    work, rates = program.work, hardware.rates
    forward, backward = _attention_flops(work.attention_flops, config.execution.remat)
    compute = {
        "matmul": max(
            product_seconds(work.matmul_flops, work.fp8_flops, rates), work.matmul_bytes / rates.memory.value
        ),
        "attention_forward": forward / rates.attention_forward.value,
        "attention_backward": backward / rates.attention_backward.value,
        "elementwise": work.elementwise_bytes / rates.memory.value,
        "optimizer": work.optimizer_bytes / rates.memory.value,
    }
    nic = rates.inter_node.value * nodes / program.num_nodes
    transfers = tuple(transfer(collective, hardware, nic) for collective in program.collectives)
    products = compute["matmul"] + compute["attention_forward"] + compute["attention_backward"]
    exposed = exposed_seconds(transfers, products)
    step_seconds = sum(compute.values()) + sum(exposed.values())
    flops = flops_per_token(config.model, config.data.sequence_length)
    rate = program.tokens_per_device / step_seconds
    steps = total_steps(config)
    days = None if steps is None else steps * step_seconds / SECONDS_PER_DAY
    dollars_per_hour = price or (hardware.price.dollars_per_device_hour if hardware.price else None)
    sent = sum(collective.count * collective.wire_bytes for collective in program.collectives)
    return Cost(
        terms={**compute, **{f"exposed_{place}": seconds for place, seconds in exposed.items()}},
        transfers=transfers,
        transfer_seconds={place: _total(_at(transfers, where)) for where, place in PLACES.items()},
        hidden_share={place: _hidden_share(_at(transfers, where)) for where, place in PLACES.items()},
        step_seconds=step_seconds,
        tokens_per_second_per_device=rate,
        mfu=rate * flops.mfu / hardware.peak_flops.value,
        mfu_causal=rate * flops.mfu_causal / hardware.peak_flops.value,
        flop_ratio=(work.matmul_flops + work.attention_flops) / work.needed_flops,
        wire_ratio=sent / program.minimum_wire_bytes if program.minimum_wire_bytes else 1.0,
        memory_ratio=program.memory.temporaries_bytes / program.memory.expected_temporaries_bytes,
        fit=fit(program.memory, hardware, headroom),
        steps=steps,
        days=days,
        dollars=None
        if days is None or dollars_per_hour is None
        else days * 24 * program.num_devices * dollars_per_hour,
    )


def fit(memory: Memory, hardware: Hardware, headroom: float) -> Fit:
    """Compares a compiled step's peak with a device's memory; `headroom` is a fraction of the memory."""
    return Fit(
        peak_bytes=memory.peak_bytes,
        unseen_bytes=sum(hardware.unseen_memory_bytes.values()),
        headroom_bytes=round(headroom * hardware.memory_bytes),
        capacity_bytes=hardware.memory_bytes,
    )


def product_seconds(flops: float, fp8_flops: float, rates: Rates) -> float:
    """Time of matrix products of so many FLOPs, of which fp8_flops in eight bits."""
    fp8_rate = (rates.matmul_fp8 or rates.matmul).value
    return (flops - fp8_flops) / rates.matmul.value + fp8_flops / fp8_rate


def transfer(collective: Collective, hardware: Hardware, nic: float) -> Transfer:
    """How long one execution takes, by a ring that visits each node once.

    Within a node every device sends `wire_bytes` over its own link. Between nodes each group's ring leaves a node
    once, with the same `wire_bytes`, and all groups of the node share its NICs:

        max(wire_bytes / link, groups_per_node x wire_bytes / NICs) + steps x latency of a step

    Args:
      collective: of one device.
      hardware: link bandwidth, latencies and the products' rate.
      nic: bytes/s that leave a node.
    """
    rates = hardware.rates
    spans = collective.group_nodes > 1
    alone = collective.group_size == collective.group_nodes
    intra = 0.0 if alone and spans else collective.wire_bytes / rates.intra_node.value
    inter = collective.groups_per_node * collective.wire_bytes / nic if spans else 0.0
    rounds = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}.get(collective.kind, 0)
    inter_hops = rounds * (collective.group_nodes - 1)
    intra_hops = rounds * (collective.group_size - collective.group_nodes)
    seconds = max(intra, inter) + intra_hops * rates.intra_node_hop + inter_hops * rates.inter_node_hop
    flops = collective.overlapped_flops, collective.overlapped_fp8_flops
    spanned = product_seconds(*flops, rates) if collective.is_async else 0.0
    return Transfer(collective, seconds, min(seconds, spanned), intra, inter)


def exposed_seconds(transfers: Sequence[Transfer], products: float) -> dict[str, float]:
    """Place -> seconds of a step that transfers add to the computation.

    Each hides what it can. Where those on one wire would together hide behind more than `products` seconds, all that
    use it hide proportionally less: the wire is shared.
    """
    scales = {}
    for wire in ("intra_seconds", "inter_seconds"):
        busy = sum(
            t.collective.count * getattr(t, wire) * t.hidden_seconds / t.seconds for t in transfers if t.seconds > 0
        )
        scales[wire] = min(1.0, products / busy) if busy else 1.0
    exposed = dict.fromkeys(PLACES.values(), 0.0)
    for t in transfers:
        scale = min((scales[wire] for wire in scales if getattr(t, wire) > 0), default=1.0)
        exposed[PLACES[t.collective.where]] += t.collective.count * (t.seconds - scale * t.hidden_seconds)
    return exposed


def total_steps(config: RunConfig) -> int | None:
    """Steps of the run: train.steps, or as many whole batches as data.mixture.tokens; None where buckets decide."""
    if config.train.steps is not None:
        return config.train.steps
    if config.data.mixture.tokens is None:
        return None
    return config.data.mixture.tokens // config.data.sequence_length // config.train.batch_size


def audit(program: Program, cost: Cost, remat: str) -> list[str]:
    """What a well-made program would not do, a sentence each (docs/plan.md says why each bound is where it is)."""
    bounds = [
        ("wire_ratio", cost.wire_ratio, "at most", 1.01),
        ("hidden_share.loop", cost.hidden_share["loop"], "at least", 0.90),
        ("hidden_share.replica", cost.hidden_share["replica"], "at least", 0.80),
        ("memory_ratio", cost.memory_ratio, "at most", 1.1),
    ]
    if remat == "dots":
        bounds.append(("flop_ratio", cost.flop_ratio, "at most", 1.05))
    broken = [
        f"{name} is {value:.3f}, should be {side} {bound}"
        for name, value, side, bound in bounds
        if (value > bound if side == "at most" else value < bound)
    ]
    return [*broken, *program.violations]


def _attention_flops(executed: float, remat: str) -> tuple[float, float]:
    """Splits attention as executed into forward passes and the backward pass, two products against five."""
    passes = 2 if remat == "full" else 1
    forward = executed * passes * FORWARD_PRODUCTS / (passes * FORWARD_PRODUCTS + BACKWARD_PRODUCTS)
    return forward, executed - forward


def _at(transfers: Iterable[Transfer], where: Where) -> list[Transfer]:
    return [t for t in transfers if t.collective.where == where]


def _total(transfers: Iterable[Transfer]) -> float:
    return sum(t.collective.count * t.seconds for t in transfers)


def _hidden_share(transfers: Sequence[Transfer]) -> float:
    total = _total(transfers)
    return sum(t.collective.count * t.hidden_seconds for t in transfers) / total if total else 1.0
