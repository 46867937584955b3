"""The arithmetic and the memory traffic of a compiled step, on one device."""

import math
import re
from dataclasses import dataclass

from tlite_jax.config import ModelConfig
from tlite_jax.model import attention
from tlite_jax.plan.hlo import COLLECTIVES, Array, Computation, Instruction, Module
from tlite_jax.plan.program import Work

# Instructions that move no data, or whose movement is counted elsewhere.
_STILL = [
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "opt-barrier",
]
_STILL += ["partition-id", "replica-id"]
_STILL += [f"{of}-{part}" for of in ("async", "call") for part in ("start", "update", "done")]
_FREE = frozenset(_STILL) | {f"{kind}{suffix}" for kind in COLLECTIVES for suffix in ("", "-start", "-done")}
_SLICES = ("slice", "dynamic-slice")
_KERNELS = ("fmha", "triton", "mosaic_gpu", "tpu_custom_call")


@dataclass(frozen=True)
class Kernels:
    """Prices the fused attention kernels of a program, whose FLOPs no compiler tells.

    Attributes:
      forward, backward: FLOPs of one layer's attention, as its kernel executes it.
      num_backward: kernels that the backward pass of one layer consists of.
    """

    forward: float
    backward: float
    num_backward: int

    @classmethod
    def of(cls, module: Module, backend: str, shape: tuple[int, int, int, int], document_masking: bool) -> "Kernels":
        """Those of a program with an attention backend; shape is (B, T, N, H) of a microbatch."""
        counts = [
            sum(_is_kernel(i) and _is_backward(i) for i in computation.instructions)
            for computation in module.computations.values()
        ]
        return cls(
            attention.forward_flops(backend, *shape, document_masking),
            attention.backward_flops(backend, *shape, document_masking),
            # The body of a loop over layers has those of one layer; around the loop there may be several layers'.
            min((count for count in counts if count), default=1),
        )

    def flops(self, instruction: Instruction) -> float:
        """FLOPs of an instruction that is an attention kernel, else 0."""
        if not _is_kernel(instruction):
            return 0.0
        return self.backward / self.num_backward if _is_backward(instruction) else self.forward


def _is_kernel(instruction: Instruction) -> bool:
    if instruction.opcode != "custom-call":
        return False
    target = (instruction.attribute(r'custom_call_target="([^"]*)"') or "").lower()
    return any(name in target for name in _KERNELS)


def _is_backward(instruction: Instruction) -> bool:
    target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
    if "fmha" in target:
        return "Backward" in target
    if re.search("dq|dkv|bwd|backward", instruction.name):
        return True
    origin = instruction.attribute(r'op_name="([^"]*)"') or ""
    return "transpose(" in origin and "rematted_computation" not in origin


class Executed:
    """What a module executes: FLOPs of products and attention, and bytes moved."""

    def __init__(self, module: Module, kernels: Kernels):
        self._module, self._kernels = module, kernels
        self._attention: dict[str, float] = {}

    def flops(self, instruction: Instruction, computation: Computation) -> float:
        """FLOPs of products and of attention kernels in one execution of an instruction, loops included."""
        return self._module.flops(instruction, computation) + self._attention_flops(instruction)

    def fp8_flops(self, instruction: Instruction, computation: Computation) -> float:
        """The part of `flops` that is done in eight bits."""
        return self._module.flops(instruction, computation, fp8=True)

    def _attention_flops(self, instruction: Instruction) -> float:
        trips = self._module.trip_count(instruction) if instruction.opcode == "while" else 1
        inner = sum(self._attention_of(callee) for role, callee in instruction.called if role != "condition")
        return self._kernels.flops(instruction) + trips * inner

    def _attention_of(self, name: str) -> float:
        if name not in self._attention:
            instructions = self._module.computations[name].instructions
            self._attention[name] = sum(self._attention_flops(instruction) for instruction in instructions)
        return self._attention[name]

    def work(self, model: ModelConfig, *, needed_flops: float, shard_bytes: int) -> Work:
        """All of it, for one step; shard_bytes are those of one device's float32 parameters."""
        matmul, attended, other = self._traffic(self._module.entry)
        # Parameters and two moments are read and written, gradients read twice: for their norm and for the update.
        optimizer = 8 * shard_bytes
        return Work(
            matmul_flops=self._module.computation_flops(self._module.entry),
            attention_flops=self._attention_of(self._module.entry),
            needed_flops=needed_flops,
            matmul_bytes=matmul,
            elementwise_bytes=max(0.0, other - optimizer),
            optimizer_bytes=optimizer,
            attention_bytes=attended,
            fp8_flops=self._module.computation_flops(self._module.entry, fp8=True),
        )

    def _traffic(self, name: str) -> tuple[float, float, float]:
        """(of products, of attention kernels, of everything else), bytes."""
        computation, totals = self._module.computations[name], [0.0, 0.0, 0.0]
        for instruction in computation.instructions:
            if instruction.opcode in ("while", "call", "conditional"):
                trips = self._module.trip_count(instruction) if instruction.opcode == "while" else 1
                for role, callee in instruction.called:
                    if role != "condition":
                        totals = [a + trips * b for a, b in zip(totals, self._traffic(callee), strict=True)]
            elif instruction.opcode not in _FREE:
                place = 1 if _is_kernel(instruction) else 0 if self._module.flops(instruction, computation) else 2
                totals[place] += self._moved(instruction, computation)
        return totals[0], totals[1], totals[2]

    def _moved(self, instruction: Instruction, computation: Computation) -> float:
        operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        written = float(sum(array.num_bytes for array in instruction.results))
        if instruction.opcode.endswith("-done"):
            return 0.0
        match instruction.opcode:
            case "dynamic-update-slice":
                return 2.0 * _bytes(operands[1].results)
            case "copy-start":
                return 2.0 * instruction.results[0].num_bytes
            case "slice-start":  # (whole array, slice, context)
                return 2.0 * instruction.results[1].num_bytes
            case "dynamic-slice" | "slice":
                return 2.0 * written
            case "broadcast":
                return written
        if instruction.opcode in ("fusion", "fusion-start"):
            fused = self._module.computations[dict(instruction.called)["calls"]]
            return _fusion_reads(fused) + _fusion_writes(fused)
        return written + sum(array.num_bytes for operand in operands for array in operand.results)


def _fusion_reads(fused: Computation) -> float:
    """Bytes that a fusion reads: of a parameter that is only sliced, the slices; of one updated in place, nothing."""
    total = 0.0
    for parameter in fused.instructions:
        if parameter.opcode != "parameter":
            continue
        users = [user for user in fused.instructions if parameter.name in user.operands]
        if users and all(_is_slice_of(user, parameter) for user in users):
            total += sum(_bytes(user.results) for user in users if user.opcode in _SLICES)
        else:
            total += _bytes(parameter.results)
    return total


def _is_slice_of(user: Instruction, parameter: Instruction) -> bool:
    return user.opcode in (*_SLICES, "dynamic-update-slice") and user.operands[0] == parameter.name


def _fusion_writes(fused: Computation) -> float:
    root = next((i for i in fused.instructions if i.text.lstrip().startswith("ROOT")), fused.instructions[-1])
    parts = [fused.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(_written(part, fused) for part in parts)


def _written(part: Instruction, fused: Computation) -> float:
    while part.opcode in ("bitcast", "copy") and part.operands[0] in fused.by_name:
        part = fused.by_name[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return _bytes(fused.by_name[part.operands[1]].results)
    return _bytes(part.results)


def _bytes(arrays: tuple[Array, ...]) -> float:
    return math.fsum(array.num_bytes for array in arrays)
