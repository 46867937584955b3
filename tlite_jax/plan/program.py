"""What a plan knows of a compiled step: its memory, its collectives and its arithmetic, for one device and one step.

Plain values that travel as JSON from the process that compiles (`plan.compile`) to the one that reports.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Where = Literal["loop", "edge", "replica"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as XLA's buffer assignment has them; what no compiler sees is not in here.

    Attributes:
      arguments_bytes: state and batch; the new state is written over the donated old one.
      temporaries_bytes: everything that lives only inside the step.
      peak_bytes: what the step needs at once.
      parameters_bytes, optimizer_bytes: the parts of arguments_bytes.
      gradients_bytes: float32 shards, a part of temporaries_bytes.
      expected_temporaries_bytes: what docs/plan.md says the step needs; the denominator of memory_ratio.
    """

    arguments_bytes: int
    temporaries_bytes: int
    peak_bytes: int
    parameters_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    expected_temporaries_bytes: int


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      name: of its instruction.
      kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
      dtype: on the wire, XLA's short name: bf16, f32.
      where: "replica" when it sums over replicas, else "loop" in a loop over layers and "edge" elsewhere.
      group_size: devices that take part in one instance of it.
      group_nodes: nodes that such a group touches.
      groups_per_node: instances of it that run in one node at the same time.
      count: executions in a step.
      buffer_bytes: of the whole: gathered, before scattering, or reduced.
      wire_bytes: that one device sends in one execution, by the ring algorithm.
      overlapped_flops: FLOPs of matrix products and attention between its start and its end, in one execution.
      is_async: whether it has a start and an end.
      overlapped_fp8_flops: the part of overlapped_flops that is done in eight bits.
    """

    name: str
    kind: str
    dtype: str
    where: Where
    group_size: int
    group_nodes: int
    groups_per_node: int
    count: int
    buffer_bytes: int
    wire_bytes: int
    overlapped_flops: float
    is_async: bool
    overlapped_fp8_flops: float = 0.0


@dataclass(frozen=True)
class Work:
    """What one device computes in one step.

    Attributes:
      matmul_flops: FLOPs of matrix products as executed, recomputation included.
      attention_flops: of attention, as its kernels execute it.
      needed_flops: 6 x matrix parameters + causal attention, times tokens (telemetry.throughput's mfu_causal).
      matmul_bytes: that matrix products read and write.
      elementwise_bytes: memory traffic of everything else but the optimizer and attention.
      optimizer_bytes: memory traffic of the update.
      attention_bytes: memory traffic of attention.
      fp8_flops: the part of matmul_flops that is done in eight bits.
    """

    matmul_flops: float
    attention_flops: float
    needed_flops: float
    matmul_bytes: float
    elementwise_bytes: float
    optimizer_bytes: float
    attention_bytes: float
    fp8_flops: float = 0.0


@dataclass(frozen=True)
class Program:
    """A step compiled for a described cluster."""

    num_devices: int
    num_nodes: int
    num_microbatches: int
    tokens_per_device: int
    compile_seconds: float
    memory: Memory
    work: Work
    collectives: tuple[Collective, ...]
    minimum_wire_bytes: int
    """Sum of wire bytes a step that the chosen dtypes make unavoidable; the denominator of wire_ratio."""
    violations: tuple[str, ...] = ()
    """What the program does that it was written not to do, a sentence each."""

    def to_json(self) -> dict[str, Any]:
        """A value for json.dumps."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Program":
        """The inverse of `to_json`."""
        parts = {
            "memory": Memory(**value["memory"]),
            "work": Work(**value["work"]),
            "collectives": tuple(Collective(**collective) for collective in value["collectives"]),
            "violations": tuple(value["violations"]),
        }
        return cls(**{**value, **parts})
