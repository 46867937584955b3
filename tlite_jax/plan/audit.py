"""The collectives of a compiled step: what each sends, how often, behind how many FLOPs, and whether it should."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.model.decoder import param_specs
from tlite_jax.plan.hlo import COLLECTIVES, Array, Computation, Instruction, Module, replica_groups
from tlite_jax.plan.program import Collective, Where
from tlite_jax.sharding import map_specs, padded_shape

SHORT_DTYPES = {"bfloat16": "bf16", "float32": "f32"}
SMALL_BYTES = 1 << 16  # norms and biases, the loss, the gradient's norm: these may travel as the compiler likes

Flops = Callable[[Instruction, Computation], float]


@dataclass(frozen=True)
class Intent:
    """What the step was written to do.

    Attributes:
      model, execution: sections of the config.
      num_replicas, num_shards: consecutive devices share the shards of a parameter.
      num_context: consecutive devices that share a sequence.
      microbatch_tokens: of one device.
      batch_rows: of a step, over all devices; the losses of all are summed up once, at its end.
    """

    model: ModelConfig
    execution: ExecutionConfig
    num_replicas: int
    num_shards: int
    num_context: int = 1
    microbatch_tokens: int = 0
    batch_rows: int = 0

    def parameters(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """(logical shape, stored shape, gathers a microbatch) of every parameter; a layer's L times."""
        specs = param_specs(self.model)
        for name, tree in specs.items():
            for spec in tree.values() if name == "blocks" else [tree]:
                stored = padded_shape(spec, self.num_shards)
                if name == "blocks":
                    yield from [(spec.shape[1:], stored[1:], 2)] * spec.shape[0]
                else:
                    yield spec.shape, stored, 1

    def minimum_wire_bytes(self) -> int:
        """Bytes that a device cannot but send in a step with the chosen dtypes, by ring algorithms.

        A microbatch gathers each block's parameters twice and the others once, and reduce-scatters every gradient; a
        step sums each shard over replicas once. Where devices share sequences, a layer's attention sends q, k, v and
        its result to the other layout and back: twice forward (the backward pass does the first again), and backward.
        """
        n, r, total = self.num_shards, self.num_replicas, 0.0
        compute, reduce, replica = (
            jnp.dtype(dtype).itemsize
            for dtype in (
                self.execution.compute_dtype,
                self.execution.reduce_dtype,
                self.execution.replica_reduce_dtype,
            )
        )
        for shape, _, gathers in self.parameters():
            size = math.prod(shape)
            total += self.execution.num_microbatches * size * (gathers * compute + reduce) * (n - 1) / n
            total += 2 * (r - 1) / r * size / n * replica
        c, model = self.num_context, self.model
        query, key = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
        exchanged = (query + 2 * key) * 3 + query * 2
        total += (
            self.execution.num_microbatches
            * model.num_hidden_layers
            * self.microbatch_tokens
            * exchanged
            * compute
            * (c - 1)
            / c
        )
        return round(total)


@dataclass(frozen=True)
class _Found:
    """A collective and its surroundings."""

    collective: Collective
    operands: tuple[Array, ...]
    groups: frozenset[frozenset[int]]
    in_microbatches: bool


def collectives(
    module: Module, intent: Intent, flops: Flops, *, devices_per_node: int, fp8_flops: Flops = lambda *_: 0.0
) -> tuple[tuple[Collective, ...], tuple[str, ...]]:
    """All collectives that the program executes, and where it departs from the intent, a sentence each.

    Args:
      module: the compiled step.
      intent: of the config that it was compiled from.
      flops: of one execution of an instruction: products and attention kernels.
      devices_per_node: consecutive devices that share a fast network.
      fp8_flops: those of `flops` that are done in eight bits.
    """
    found = list(_Reader(module, intent, flops, fp8_flops, devices_per_node).read(module.entry))
    return tuple(item.collective for item in found), tuple(_violations(found, intent))


@dataclass(frozen=True)
class _Reader:
    """Walks through a module; see `collectives`."""

    module: Module
    intent: Intent
    flops: Flops
    fp8_flops: Flops
    devices_per_node: int

    def read(
        self, name: str, *, trips: int = 1, in_layers: bool = False, in_microbatches: bool = False
    ) -> Iterator[_Found]:
        """The collectives that a computation reaches, which runs `trips` times in a step."""
        computation = self.module.computations[name]
        for place, instruction in enumerate(computation.instructions):
            if sent := _sent(self.module, computation, instruction):
                yield self._found(sent, computation, place, trips, in_layers, in_microbatches)
            if sent or instruction.opcode == "fusion":
                continue
            for role, callee in instruction.called:
                if role == "body":
                    # A loop around loops with collectives is the one over microbatches; the others are over layers.
                    is_outer = _has_communicating_loop(self.module, callee)
                    yield from self.read(
                        callee,
                        trips=trips * self.module.trip_count(instruction),
                        in_layers=in_layers or not is_outer,
                        in_microbatches=in_microbatches or is_outer,
                    )
                elif role != "condition":
                    yield from self.read(callee, trips=trips, in_layers=in_layers, in_microbatches=in_microbatches)

    def _found(
        self, sent: "_Sent", computation: Computation, place: int, trips: int, in_layers: bool, in_microbatches: bool
    ) -> _Found:
        kind, instruction = sent.kind, computation.instructions[place]
        ids = _groups(sent.collective)
        operands = tuple(
            array
            for operand in sent.collective.operands
            if operand in sent.computation.by_name
            for array in sent.computation.by_name[operand].results
        )
        members = ids.shape[1]
        buffer = sum(array.num_bytes for array in operands) * (members if kind == "all-gather" else 1)
        wire = buffer * (members - 1) / members * (2 if kind == "all-reduce" else 1)
        groups = frozenset(frozenset(row) for row in ids.tolist())
        nodes = ids // self.devices_per_node
        where: Where = "loop" if in_layers else "edge"
        if self.intent.num_replicas > 1 and groups == _across(self.intent):
            where = "replica"
        collective = Collective(
            name=instruction.name,
            kind=kind,
            dtype=max(operands, key=lambda array: array.num_bytes).dtype,
            where=where,
            group_size=members,
            group_nodes=max(len(set(row)) for row in nodes.tolist()),
            groups_per_node=int(np.sum(np.any(nodes == nodes.flat[0], axis=1))),
            count=trips,
            buffer_bytes=buffer,
            wire_bytes=round(wire),
            overlapped_flops=self._spanned(computation, place, sent, self.flops),
            is_async=sent.is_start,
            overlapped_fp8_flops=self._spanned(computation, place, sent, self.fp8_flops),
        )
        return _Found(collective, operands, groups, in_microbatches)

    def _spanned(self, computation: Computation, place: int, sent: "_Sent", flops: Flops) -> float:
        """FLOPs between a start and its end, in the order of the schedule; a synchronous one spans none."""
        if not sent.is_start:
            return 0.0
        started, total = {computation.instructions[place].name}, 0.0
        for instruction in computation.instructions[place + 1 :]:
            if not started.isdisjoint(instruction.operands):
                if instruction.opcode.endswith("-done"):
                    break
                if instruction.opcode.endswith("-update"):
                    started.add(instruction.name)
            if _ends_fused(self.module, instruction, sent.collective):
                break
            total += flops(instruction, computation)
        return total


class _Sent(NamedTuple):
    """A collective as an instruction does or starts it: itself, or inside of what the instruction calls."""

    kind: str
    computation: Computation
    collective: Instruction
    is_start: bool


def _sent(module: Module, computation: Computation, instruction: Instruction) -> _Sent | None:
    """What an instruction sends, if it sends anything.

    On TPUs SparseCores carry a collective as a call that starts and is done. Where they do not, collectives are
    fusions: an all-reduce with the slice of it that is kept (a reduce-scatter by another name), or one that other
    fusions carry on beside their products until one that ends it; those send nothing new.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
        return _Sent(opcode, computation, instruction, instruction.opcode != opcode)
    if opcode not in ("async", "call", "fusion") or instruction.opcode == "call":
        return None
    called = module.computations.get(dict(instruction.called).get("calls", ""))
    inner = next((i for i in called.instructions if i.opcode in COLLECTIVES), None) if called else None
    if called is None or inner is None:
        return None
    if opcode in ("async", "call"):
        return _Sent(inner.opcode, called, inner, True)
    if "all-reduce-scatter" in called.name:
        return _Sent("reduce-scatter", called, inner, False)
    if _has_target(called, "AsyncCollectiveStart"):
        return _Sent(inner.opcode, called, inner, True)
    return None


def _ends_fused(module: Module, instruction: Instruction, collective: Instruction) -> bool:
    called = module.computations.get(dict(instruction.called).get("calls", ""))
    channel = collective.attribute(r"channel_id=(\d+)")
    return (
        called is not None
        and _has_target(called, "AsyncCollectiveDone")
        and any(channel and i.attribute(r"channel_id=(\d+)") == channel for i in called.instructions)
    )


def _has_target(computation: Computation, target: str) -> bool:
    return any(f'custom_call_target="{target}"' in instruction.text for instruction in computation.instructions)


def _groups(collective: Instruction) -> np.ndarray:
    """[groups, members] of device ids; those of a permutation are its pairs."""
    mark = "source_target_pairs=" if "source_target_pairs=" in collective.text else "replica_groups="
    return replica_groups(collective.text.split(mark)[1])


def _has_communicating_loop(module: Module, name: str) -> bool:
    for instruction in module.computations[name].instructions:
        for role, callee in instruction.called:
            if role == "body" and _communicates(module, callee):
                return True
            if role not in ("body", "condition") and _has_communicating_loop(module, callee):
                return True
    return False


def _communicates(module: Module, name: str) -> bool:
    return any(
        _sent(module, module.computations[name], instruction)
        or any(_communicates(module, callee) for role, callee in instruction.called if role != "condition")
        for instruction in module.computations[name].instructions
    )


def _within(intent: Intent) -> frozenset[frozenset[int]]:
    n = intent.num_shards
    return frozenset(frozenset(range(r * n, (r + 1) * n)) for r in range(intent.num_replicas))


def _stays_within(groups: frozenset[frozenset[int]], intent: Intent) -> bool:
    return all(len({device // intent.num_shards for device in group}) == 1 for group in groups)


def _sharing(intent: Intent) -> frozenset[frozenset[int]]:
    """The groups that share a sequence."""
    c = intent.num_context
    return frozenset(
        frozenset(range(first, first + c)) for first in range(0, intent.num_replicas * intent.num_shards, c)
    )


def _across(intent: Intent) -> frozenset[frozenset[int]]:
    n, r = intent.num_shards, intent.num_replicas
    return frozenset(frozenset(range(shard, r * n, n)) for shard in range(n))


def _violations(found: Sequence[_Found], intent: Intent) -> Iterator[str]:
    large = [item for item in found if not _is_small(item, intent)]
    expected = {"all-gather": _within(intent), "reduce-scatter": _within(intent), "all-reduce": _across(intent)}
    for item in large:
        collective = item.collective
        # Between those that share a sequence; or, on TPUs, where a reduce-scatter's pieces do not end at a shard's.
        is_exchange = (intent.num_context > 1 and item.groups == _sharing(intent)) or (
            collective.kind == "collective-permute" and _stays_within(item.groups, intent)
        )
        if item.groups != expected.get(collective.kind) and not is_exchange:
            yield (
                f"{collective.name}: {collective.kind} of {collective.buffer_bytes:,} bytes over "
                f"{len(item.groups)} groups of {collective.group_size}, in no place of the plan"
            )
        elif collective.where == "replica" and item.in_microbatches:
            yield f"{collective.name}: a sum over replicas inside the loop over microbatches"
    yield from _dtype_violations(large, intent)
    yield from _gather_violations(large, intent)
    yield from _replica_violations(found, intent)


def _is_small(item: _Found, intent: Intent) -> bool:
    """Whether it may travel as the compiler likes; the losses of rows may, too, outside of loops."""
    collective = item.collective
    in_loop = collective.where == "loop" or item.in_microbatches
    rows_bytes = 0 if collective.kind != "all-reduce" or in_loop else 2 * 4 * intent.batch_rows
    return collective.buffer_bytes <= SMALL_BYTES + rows_bytes


def _dtype_violations(large: Sequence[_Found], intent: Intent) -> Iterator[str]:
    execution = intent.execution
    asked = {
        "all-gather": execution.compute_dtype,
        "reduce-scatter": execution.reduce_dtype,
        "all-reduce": execution.replica_reduce_dtype,
    }
    for item in large:
        wire = item.collective.dtype
        dtype = asked.get(item.collective.kind)
        if dtype and wire not in (SHORT_DTYPES[dtype], "s32"):  # s32: segment ids
            yield f"{item.collective.name}: {item.collective.kind} in {wire}, {SHORT_DTYPES[dtype]} was asked for"


def _gather_violations(large: Sequence[_Found], intent: Intent) -> Iterator[str]:
    """Whether a parameter is gathered or reduce-scattered more often than it should be, told apart by shape.

    (Less often: XLA for CPUs moves gathers out of the loop over microbatches. Then memory tells.)
    """
    n, k = intent.num_shards, intent.execution.num_microbatches
    if n == 1:
        return
    gathers: dict[tuple[int, ...], int] = {}
    scatters: dict[tuple[int, ...], int] = {}
    for _, stored, times in intent.parameters():
        shard = _bare((stored[0] // n, *stored[1:]))
        gathers[shard] = gathers.get(shard, 0) + times * k
        scatters[_bare(stored)] = scatters.get(_bare(stored), 0) + k
    for kind, wanted in (("all-gather", gathers), ("reduce-scatter", scatters)):
        seen: dict[tuple[int, ...], int] = {}
        for item in large:
            if item.collective.kind == kind:
                for array in item.operands:
                    shape = _bare(array.dims)
                    seen[shape] = seen.get(shape, 0) + item.collective.count
        for shape in wanted:
            if seen.get(shape, 0) > wanted[shape]:
                yield f"{kind} of {list(shape)}: {seen[shape]} times a step, {wanted[shape]} are needed"


def _bare(dims: Sequence[int]) -> tuple[int, ...]:
    """Without dims of size one, which XLA adds and drops."""
    return tuple(size for size in dims if size != 1)


def _replica_violations(found: Sequence[_Found], intent: Intent) -> Iterator[str]:
    if intent.num_replicas == 1:
        return
    wanted = sum(math.prod(stored) // intent.num_shards for _, stored, _ in intent.parameters())
    seen = sum(
        item.collective.count * sum(array.size for array in item.operands)
        for item in found
        if item.collective.kind == "all-reduce" and item.groups == _across(intent)
    )
    if abs(seen - wanted) > 0.01 * wanted:
        yield f"sums over replicas of {seen:,} numbers a step, {wanted:,} are needed: each gradient shard's once"


def parameter_bytes(model: ModelConfig, num_shards: int) -> int:
    """Bytes of one device's float32 shards of all parameters, padding included."""
    sizes: list[Any] = []
    map_specs(lambda spec: sizes.append(math.prod(padded_shape(spec, num_shards)) // num_shards), param_specs(model))
    return 4 * sum(sizes)
