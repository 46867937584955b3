"""How fast the devices exchange data: the three collectives of a step, over the axes that a run uses them on.

Rates are what NCCL's tests call bus bandwidth: bytes that each device must send, a second, whatever the group's size.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from launch.doctor_parts.findings import Finding, ok

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tlite_jax.plan.topology import Hardware

BYTES_ON_CPU, BYTES = 2**22, 2**28  # of what is gathered, or summed, on every device
SECONDS = 0.5  # for each collective, at least three times
SLOW, TOO_SLOW = 0.6, 0.25  # shares of the hardware file's rate


@dataclass(frozen=True)
class Rate:
    """A collective over an axis: bytes/s that each device sends."""

    collective: str
    axis: str
    group_size: int
    bytes_per_second: float


def measure(mesh: "Mesh", num_bytes: int | None = None) -> list[Rate]:
    """Times all-gather and reduce-scatter over the axes of shards, all-reduce over replicas; all processes together."""
    from tlite_jax.sharding import REPLICA, SHARDS

    if num_bytes is None:
        num_bytes = BYTES_ON_CPU if mesh.devices.flat[0].platform == "cpu" else BYTES
    num_shards, num_replicas = mesh.shape[SHARDS[0]] * mesh.shape[SHARDS[1]], mesh.shape[REPLICA]
    wanted: list[tuple[str, tuple[str, ...], int]] = [
        ("all-gather", SHARDS, num_shards),
        ("reduce-scatter", SHARDS, num_shards),
    ]
    wanted += [("all-reduce", (REPLICA,), num_replicas)] if num_replicas > 1 else [("all-reduce", SHARDS, num_shards)]
    rates = []
    for name, axes, size in wanted:
        if size > 1:
            seconds, sent = _time(mesh, name, axes, size, num_bytes // 4)
            axis = "replica" if axes == (REPLICA,) else "fsdp"
            rates.append(Rate(name, axis, size, sent / seconds))
    return rates


def compare(rates: list[Rate], hardware: "Hardware | None", devices_per_node: int) -> list[Finding]:
    """Findings; a warning below 60% of the described rate, a failure below a quarter of it."""
    if not rates:
        return [ok("interconnect", "one device: nothing to exchange")]
    return [_finding(rate, hardware, devices_per_node) for rate in rates]


def _finding(rate: Rate, hardware: "Hardware | None", devices_per_node: int) -> Finding:
    said = f"{rate.collective} over {rate.axis} ({rate.group_size} devices): {rate.bytes_per_second / 1e9:.2f} GB/s"
    if hardware is None:
        return ok("interconnect", said)
    between = rate.group_size > devices_per_node or rate.axis == "replica"
    described = hardware.rates.intra_node.value
    if between:  # every device of a node sends through its share of the NICs, or a ring through all of them
        per_device = 1 if rate.group_size > devices_per_node and rate.axis != "replica" else devices_per_node
        described = min(described, hardware.rates.inter_node.value / per_device)
    share = rate.bytes_per_second / described
    said += f", {share:.0%} of the described {described / 1e9:.0f} ({'between' if between else 'in'} nodes)"
    if share >= SLOW:
        return ok("interconnect", said)
    mend = (
        "NCCL_DEBUG=INFO shows the network that NCCL chose: NET/IB is wanted, NET/Socket is Ethernet"
        if between
        else "nvidia-smi topo -m shows how the GPUs are connected; /dev/shm may be too small in a container"
    )
    return Finding("interconnect", "fail" if share < TOO_SLOW else "warn", said, mend)


def _time(mesh: "Mesh", name: str, axes: tuple[str, ...], size: int, values: int) -> tuple[float, float]:
    """(median seconds of one, bytes that each device sends in it) of so many float32."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from tlite_jax.sharding import DEVICES

    values = max(1, values // size) * size
    spec = PartitionSpec(DEVICES)
    local: dict[str, Callable[[jax.Array], jax.Array]] = {
        "all-gather": partial(jax.lax.all_gather, axis_name=axes, tiled=True),
        "reduce-scatter": partial(jax.lax.psum_scatter, axis_name=axes, tiled=True),
        "all-reduce": partial(jax.lax.psum, axis_name=axes),
    }
    sent = 4 * values * (size - 1) / size * (2 if name == "all-reduce" else 1)
    given = values // size if name == "all-gather" else values
    function = jax.jit(jax.shard_map(local[name], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.jit(lambda: jnp.ones(given * mesh.size, jnp.float32), out_shardings=NamedSharding(mesh, spec))()
    function(x).block_until_ready()
    start, took = time.monotonic(), []
    for _ in range(5):  # the same number in all processes
        began = time.monotonic()
        function(x).block_until_ready()
        took.append(time.monotonic() - began)
        if jax.process_count() == 1 and time.monotonic() - start > SECONDS and len(took) >= 3:
            break
    return statistics.median(took), sent
