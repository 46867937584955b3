"""Accelerators described, none needed: what a cluster's devices are and do, and how a compiler is told of them.

Hardware is data, one YAML file each (configs/hardware/*.yaml). Every rate carries its source; docs/plan.md says how
to add a machine.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from tlite_jax.config import Section
from tlite_jax.config.base import NonNegativeFloat, Positive, PositiveFloat
from tlite_jax.config_files import parse, read_yaml
from tlite_jax.errors import UserError

if TYPE_CHECKING:
    import jax

Text = Annotated[str, Field(min_length=1)]

# Limits of every NVIDIA GPU since compute capability 3.0 (CUDA C++ Programming Guide, technical specifications).
_CUDA_LIMITS = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
}


class Sourced(Section):
    """A rate and where it comes from."""

    value: PositiveFloat
    source: Text = Field(description="who measured it, or: datasheet x an efficiency that is said")


class Rates(Section):
    """What one device sustains, FLOP/s and bytes/s; a NIC's bandwidth is that of a whole node."""

    matmul: Sourced = Field(description="bf16 matrix products, FLOP/s")
    matmul_fp8: Sourced | None = Field(default=None, description="products in eight bits; null: as in bf16")
    attention_forward: Sourced = Field(description="fused causal attention, FLOP/s of the causal half")
    attention_backward: Sourced = Field(description="likewise, counted as five products")
    memory: Sourced = Field(description="reading and writing device memory, bytes/s")
    intra_node: Sourced = Field(description="ring over NVLink or ICI: what one device sends, bytes/s")
    inter_node: Sourced = Field(description="what one node sends to others, bytes/s")
    intra_node_hop: NonNegativeFloat = Field(default=0.0, description="latency of a ring's step in a node, seconds")
    inter_node_hop: NonNegativeFloat = Field(default=0.0, description="latency of a ring's step between nodes, seconds")


class Price(Section):
    """A public price of one device for one hour."""

    dollars_per_device_hour: PositiveFloat
    source: Text = Field(description="whose price and of which date")


class GpuTarget(Section):
    """What XLA wants to know of an NVIDIA GPU (the GpuTargetConfigProto), from its datasheet."""

    description: Text
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    core_count: Positive = Field(description="streaming multiprocessors")
    clock_rate_ghz: PositiveFloat = Field(description="boost")
    memory_bandwidth: Positive = Field(description="bytes/s, of the datasheet")
    l2_cache_size: Positive
    fpus_per_core: Positive
    shared_memory_per_core: Positive
    shared_memory_per_block_optin: Positive

    def textproto(self, memory_bytes: int) -> str:
        """The target description as XLA reads it."""
        major, minor = self.compute_capability.split(".")
        fields = {
            "device_memory_size": memory_bytes,
            **self.model_dump(exclude={"description", "compute_capability"}),
            **_CUDA_LIMITS,
        }
        lines = [f"  {name}: {value}" for name, value in fields.items()]
        capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
        return "\n".join(
            [
                'platform_name: "CUDA"',
                f'device_description_str: "{self.description}"',
                "gpu_device_info {",
                capability,
                *lines,
                "}\n",
            ]
        )


class TpuTarget(Section):
    """How libtpu names a slice, and which slices there are. A host has 2 x 2 chips, so x and y are even."""

    version: Text = Field(description="as libtpu calls it: v5p, tpu7x")
    largest_slice: Annotated[tuple[Positive, ...], Field(min_length=2, max_length=3)] = Field(
        description="chips along each axis of a pod: two axes or three"
    )
    devices_per_chip: Positive = Field(default=1, description="that jax sees")
    chip_config_name: str | None = None


class Hardware(Section):
    """A kind of node, and what a roofline needs of it."""

    title: Text
    kind: Literal["nvidia", "tpu", "cpu"]
    devices_per_node: Positive = Field(description="jax devices of one host")
    memory_bytes: Positive = Field(description="of one device, as the driver reports it")
    peak_flops: Sourced = Field(description="dense bf16, FLOP/s; the denominator of mfu")
    rates: Rates
    unseen_memory_bytes: Mapping[str, Positive] = Field(default={}, description="what no compiler counts, by name")
    price: Price | None = None
    gpu: GpuTarget | None = None
    tpu: TpuTarget | None = None

    @model_validator(mode="after")
    def _target_fits_kind(self) -> Self:
        wanted = {"nvidia": "gpu", "tpu": "tpu"}.get(self.kind)
        given = [name for name in ("gpu", "tpu") if getattr(self, name) is not None]
        if given != [wanted] * (wanted is not None):
            raise ValueError(f"kind {self.kind} needs {f'the section {wanted}' if wanted else 'neither gpu nor tpu'}")
        return self


@dataclass(frozen=True)
class Domain:
    """The largest sets of devices that reach each other without a NIC: nodes of GPUs, slices of TPUs."""

    num_domains: int
    devices_per_domain: int
    nodes_per_domain: int
    name: str

    @property
    def num_devices(self) -> int:
        """In the whole cluster."""
        return self.num_domains * self.devices_per_domain


def load_hardware(name: str, directory: Path) -> Hardware:
    """Reads `directory/name.yaml`, or the YAML file that `name` is a path of.

    Raises:
      UserError: there is none, or it is not a description of hardware; names those that there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else directory / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(entry.stem for entry in directory.glob("*.yaml")))
        raise UserError(f"--hardware {name} is not known; choose from {known}, or give a YAML file") from error
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a hardware file is a mapping, this is {type(values).__name__}")
    return parse(Hardware, values, origin=str(path))


def domain(hardware: Hardware, nodes: int) -> Domain:
    """How `nodes` nodes hang together.

    Raises:
      UserError: no slice of TPUs has that many hosts; names the nearest that does.
    """
    if hardware.tpu is None:
        return Domain(nodes, hardware.devices_per_node, 1, "node")
    shape, num_slices = _slices(hardware, nodes)
    chips_per_node = hardware.devices_per_node // hardware.tpu.devices_per_chip
    chips = nodes * chips_per_node
    per_slice = chips // num_slices * hardware.tpu.devices_per_chip
    return Domain(num_slices, per_slice, nodes // num_slices, f"slice {'x'.join(map(str, shape))}")


def topology_name(hardware: Hardware, nodes: int) -> str:
    """What the compiler's plugin calls the cluster: partitions x hosts x GPUs, or version:slice; "cpu" for CPUs."""
    if hardware.kind == "nvidia":
        return f"1x{nodes}x{hardware.devices_per_node}"
    if hardware.tpu is None:
        return "cpu"
    shape, _ = _slices(hardware, nodes)
    return f"{hardware.tpu.version}:{'x'.join(map(str, shape))}"


def devices(hardware: Hardware, nodes: int, *, on_cpu: bool = False) -> "Sequence[jax.Device]":
    """Devices to compile for, in the order of nodes. They hold nothing and run nothing.

    To be called in a process whose environment is `plan.worker`'s: it initialises jax, and a plugin may end it.

    Args:
      hardware: what they are.
      nodes: hosts.
      on_cpu: emulated CPU devices in their place.
    """
    import jax
    from jax.experimental import topologies

    if on_cpu or hardware.kind == "cpu":
        return jax.devices("cpu")[: nodes * hardware.devices_per_node]
    name = topology_name(hardware, nodes)
    if hardware.gpu is not None:
        target = hardware.gpu.textproto(hardware.memory_bytes)
        return topologies.get_topology_desc(platform="cuda", target_config=target, topology=name).devices
    assert hardware.tpu is not None
    _, num_slices = _slices(hardware, nodes)
    options: dict[str, object] = {} if num_slices == 1 else {"num_slices": num_slices}
    if hardware.tpu.chip_config_name is not None:
        options["chip_config_name"] = hardware.tpu.chip_config_name
    return topologies.get_topology_desc(name, platform="tpu", **options).devices


def _slices(hardware: Hardware, nodes: int) -> tuple[tuple[int, ...], int]:
    """(chips along each axis of a slice, number of slices); the fewest slices, each as near to a cube as it goes."""
    tpu = hardware.tpu
    assert tpu is not None
    chips_per_node = hardware.devices_per_node // tpu.devices_per_chip
    found = _find_slices(tpu.largest_slice, nodes, chips_per_node)
    if found is not None:
        return found
    around = itertools.chain.from_iterable((nodes - step, nodes + step) for step in range(1, nodes + 1))
    mend = next(number for number in around if number > 0 and _find_slices(tpu.largest_slice, number, chips_per_node))
    largest = "x".join(map(str, tpu.largest_slice))
    raise UserError(
        f"--nodes {nodes}: {nodes * chips_per_node} chips make no slices of {tpu.version} (at most {largest}, "
        f"of hosts of {chips_per_node}); use --nodes {mend}"
    )


def _find_slices(largest: Sequence[int], nodes: int, chips_per_node: int) -> tuple[tuple[int, ...], int] | None:
    chips = nodes * chips_per_node
    most = 1
    for size in largest:
        most *= size
    for num_slices in [1] if chips <= most else range(-(-chips // most), nodes + 1):
        if nodes % num_slices == 0 and (shape := _shape(largest, chips // num_slices)) is not None:
            return shape, num_slices
    return None


def _shape(largest: Sequence[int], chips: int) -> tuple[int, ...] | None:
    """The axes whose product is `chips`, x and y even, with the smallest sum."""
    rest = (1,) if len(largest) == 2 else range(1, largest[2] + 1)
    shapes = [
        (x, chips // (x * z), z)[: len(largest)]
        for z in rest
        for x in range(2, largest[0] + 1, 2)
        if chips % (x * z) == 0 and chips // (x * z) % 2 == 0 and chips // (x * z) <= largest[1]
    ]
    return min(shapes, key=lambda shape: (sum(shape), shape), default=None)
