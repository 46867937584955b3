"""Reads the text of a compiled, scheduled HLO module: its instructions, loops, products and replica groups."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
DTYPE_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    """An array's type: XLA's short dtype and its dims."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements, without padding."""
        bits = re.search(r"\d+", self.dtype)
        width = DTYPE_BYTES[self.dtype] if self.dtype in DTYPE_BYTES else int(bits[0]) / 8 if bits else 4
        return math.ceil(self.size * width)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; operands are names of others of the same computation."""

    name: str
    opcode: str
    type_text: str
    operands: tuple[str, ...]
    text: str

    @cached_property
    def results(self) -> tuple[Array, ...]:
        """Every array in the result, tuples flattened."""
        return arrays(self.type_text)

    @property
    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of what it runs: body, condition, branch, calls; not a reduction's scalar function."""
        pairs = [
            ("calls" if role == "to_apply" else role, name)
            for role, name in _CALLED.findall(self.text)
            if role != "to_apply" or self.opcode in ("call", "call-start")
        ]
        if branches := _BRANCHES.search(self.text):
            pairs += [("branch", name.strip().lstrip("%")) for name in branches[1].split(",")]
        return pairs

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern found in the instruction's text, if any."""
        found = re.search(pattern, self.text)
        return found[1] if found else None


def arrays(text: str) -> tuple[Array, ...]:
    """Every array type in a text."""
    return tuple(
        Array(dtype, tuple(int(size) for size in dims.split(",") if size)) for dtype, dims in _ARRAY.findall(text)
    )


@dataclass(frozen=True)
class Computation:
    """Instructions in their scheduled order."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instruction name -> instruction."""
        return {instruction.name: instruction for instruction in self.instructions}


class Module:
    """A compiled module."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], Computation(header[2]))
                self.entry = header[2] if header[1] else self.entry
            elif current and (found := _INSTRUCTION.match(line)):
                name, type_text, opcode, rest = found.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", rest[: _closing(rest)]))
                current.instructions.append(Instruction(name, opcode, type_text, operands, line))
        if not self.entry:
            raise ValueError("not the text of an HLO module: it has no entry computation")
        self._flops: dict[tuple[str, bool], float] = {}

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a while loop: what XLA notes on it, or the constant that its condition compares with.

        Raises:
          ValueError: neither is there.
        """
        if known := loop.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)'):
            return int(known)
        condition = dict(loop.called)["condition"]
        bounds = {
            int(value)
            for instruction in self._reachable(condition)
            if instruction.opcode == "constant" and (value := instruction.attribute(r"constant\((\d+)\)"))
        }
        if len(bounds) != 1:
            raise ValueError(f"{loop.name}: cannot tell how often it runs; its condition names {sorted(bounds)}")
        return bounds.pop()

    def _reachable(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations[name].instructions:
            yield instruction
            for _, callee in instruction.called:
                yield from self._reachable(callee)

    def flops(self, instruction: Instruction, computation: Computation, *, fp8: bool = False) -> float:
        """FLOPs of matrix products that one execution of an instruction takes, trips of its loops included.

        Args:
          instruction, computation: which, and where it is.
          fp8: count only the products of two arrays of eight bits.
        """
        if instruction.opcode in _PRODUCTS:
            is_counted = not fp8 or _has_eight_bits(instruction, computation)
            return _PRODUCTS[instruction.opcode](instruction, computation) if is_counted else 0.0
        trips = self.trip_count(instruction) if instruction.opcode == "while" else 1
        return trips * sum(
            self.computation_flops(callee, fp8=fp8) for role, callee in instruction.called if role != "condition"
        )

    def computation_flops(self, name: str, *, fp8: bool = False) -> float:
        """FLOPs of matrix products in one execution of a computation."""
        if (name, fp8) not in self._flops:
            computation = self.computations[name]
            self._flops[name, fp8] = sum(self.flops(each, computation, fp8=fp8) for each in computation.instructions)
        return self._flops[name, fp8]


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    left = computation.by_name[instruction.operands[0]].results[0]
    contracted = _numbers(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2.0 * instruction.results[0].size * math.prod(left.dims[dim] for dim in contracted)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """TPUs write products so: summed over the kernel's input features and, where the input is, its window."""
    source, kernel = (computation.by_name[name].results[0] for name in instruction.operands[:2])
    labels = instruction.attribute(r"dim_labels=(\w+_\w+->\w+)")
    assert labels
    of_source, of_kernel, of_result = re.split("_|->", labels)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    summed = float(kernel.dims[of_kernel.index("i")])
    for number, axis in enumerate(sorted(filter(str.isdigit, of_result))):
        size, outputs = source.dims[of_source.index(axis)], instruction.results[0].dims[of_result.index(axis)]
        summed *= _taps(window, number, size, outputs) / outputs
    return 2.0 * instruction.results[0].size * summed / int(instruction.attribute(r"batch_group_count=(\d+)") or 1)


def _taps(window: dict[str, str], number: int, size: int, outputs: int) -> int:
    """Pairs of an output and a tap of the window, along one of its dims, that meet the input and not its padding."""

    def of(name: str, default: str) -> str:
        return window[name].split("x")[number] if name in window else default

    taps, stride = int(of("size", "1")), int(of("stride", "1"))
    low, source_step, tap_step = (
        int(of("pad", "0_0").split("_")[0]),
        int(of("lhs_dilate", "1")),
        int(of("rhs_dilate", "1")),
    )
    places = np.arange(outputs)[:, None] * stride + np.arange(taps) * tap_step - low
    return int(np.sum((places >= 0) & (places <= (size - 1) * source_step) & (places % source_step == 0)))


def _gemm_flops(instruction: Instruction, computation: Computation) -> float:
    """A product that XLA gave to cuBLAS: its dimension numbers are in the backend's config."""
    if (
        "gemm" not in (instruction.attribute(r'custom_call_target="([^"]*)"') or "")
        and "$matmul" not in instruction.text
    ):
        return 0.0
    left = computation.by_name[instruction.operands[0]].results[0]
    contracted = _numbers((instruction.attribute(r'lhs_contracting_dimensions":\[([^\]]*)\]') or "").replace('"', ""))
    return 2.0 * instruction.results[0].size * math.prod(left.dims[dim] for dim in contracted)


_PRODUCTS = {"dot": _dot_flops, "convolution": _convolution_flops, "custom-call": _gemm_flops}


def _has_eight_bits(instruction: Instruction, computation: Computation) -> bool:
    operands = [computation.by_name[name] for name in instruction.operands[:2] if name in computation.by_name]
    return len(operands) == 2 and all(operand.results[0].dtype.startswith("f8") for operand in operands)


def replica_groups(text: str) -> np.ndarray:
    """The groups of devices of a collective, [groups, members], from any form in which XLA writes them.

    `{{0,1},{2,3}}`; `[groups,members]<=[dims]T(permutation)`, a transposed count; `mesh['a'=2,'b'=4] {'b'}`, all
    devices that differ along the named axes, with the order of devices as another transposed count.
    """
    if explicit := re.match(r"\{(\{[\d,{} ]*\})\}", text):
        return np.array([_numbers(row.replace(" ", "")) for row in re.findall(r"\{([\d, ]+)\}", explicit[1])])
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\[.*?)\))? \{([^}]*)\}", text):
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        ids = _counted(mesh[2]) if mesh[2] else np.arange(math.prod(sizes))
        along = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        across = [axis for axis in range(len(sizes)) if axis not in along]
        members = math.prod(sizes[axis] for axis in along)
        return ids.reshape(sizes).transpose(across + along).reshape(-1, members)
    counted = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if not counted:
        raise ValueError(f"replica groups in a form not known: {text[:80]}")
    return _counted(counted[2]).reshape(_numbers(counted[1]))


def _counted(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2.. in that shape, transposed."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text)
    assert found
    ids = np.arange(math.prod(_numbers(found[1]))).reshape(_numbers(found[1]))
    return ids.transpose(_numbers(found[2])) if found[2] else ids
