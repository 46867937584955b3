"""What the device can do at best: matrix products of the model's own shapes, attention, and copying memory.

Each framework measures with its own calls, in its own process; the floor takes the better of the two.

Shapes: T tokens of a sequence, D embed, N heads, K kv heads, H head_dim; a product is [m, k] x [k, n].
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from bench._gpu_problem import BLOCK_MATRICES, Problem, parameter_shapes, report


class Product(NamedTuple):
    """One of the three products that a weight [O, I] takes part in, by einsum's letters, and how often a step has it.

    Attributes:
      equation: x is ti, dy is to, the weight is oi.
      outputs, inputs: O and I.
      per_layer, once: how often it occurs in a layer, and outside of the layers.
    """

    equation: str
    outputs: int
    inputs: int
    per_layer: int
    once: int

    def flops(self, tokens: int) -> float:
        """Of one occurrence over so many tokens."""
        return 2.0 * tokens * self.outputs * self.inputs


EQUATIONS = {"forward": "ti,oi->to", "input gradient": "to,oi->ti", "weight gradient": "to,ti->oi"}


def products(problem: Problem) -> dict[str, Product]:
    """Every matrix product of the model but attention's, equal shapes counted together."""
    shapes = parameter_shapes(problem.model(1))
    counts: dict[tuple[int, int], list[int]] = {}
    for name in (*BLOCK_MATRICES, "head"):
        outputs, inputs = shapes[name]
        per_layer, once = counts.setdefault((outputs, inputs), [0, 0])
        counts[outputs, inputs] = [per_layer + (name != "head"), once + (name == "head")]
    return {
        f"{outputs}x{inputs} {direction}": Product(equation, outputs, inputs, *number)
        for (outputs, inputs), number in counts.items()
        for direction, equation in EQUATIONS.items()
    }


def measure_jax(problem: Problem) -> dict[str, Any]:
    """The ceilings as jax reaches them.

    Returns:
      gemm: {product: FLOP/s}; attention: {backend: seconds, forward and backward of one sequence}; copy: bytes/s, read
      and written.
    """
    import jax
    import jax.numpy as jnp

    from tlite_jax.model import attention

    def timed(function: Callable, *operands: Any) -> float:
        call = jax.jit(function)
        return _median_seconds(lambda: call(*operands), jax.block_until_ready, problem)

    keys = iter(jax.random.split(jax.random.key(0), 64))

    def random(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape, problem.dtype)

    gemm = {}
    for name, product in products(problem).items():
        sizes = {"t": problem.sequence, "o": product.outputs, "i": product.inputs}
        left, right = product.equation.split("->")[0].split(",")
        operands = [random(*(sizes[letter] for letter in term)) for term in (left, right)]
        seconds = timed(lambda a, b, equation=product.equation: jnp.einsum(equation, a, b), *operands)
        gemm[name] = product.flops(problem.sequence) / seconds

    q, k, v, gradient = _attention_operands(problem, random)
    backend = attention.select(
        problem.execution.get("attention", "auto"),
        platform=jax.default_backend(),
        dtype=problem.dtype,
        document_masking=False,
        sequence_length=problem.sequence,
        head_dim=problem.shape["head_dim"],
    )

    def both_ways(q: Any, k: Any, v: Any, gradient: Any) -> Any:
        return jax.vjp(lambda q, k, v: backend(q, k, v, None), q, k, v)[1](gradient)

    seconds = timed(both_ways, q, k, v, gradient)
    large = jnp.zeros(_copy_elements(problem), jnp.float32)
    copied = 2 * large.nbytes / timed(lambda x: x + 1, large)
    return {"gemm": gemm, "attention": {f"jax {attention.backend_name(backend)}": seconds}, "copy": copied}


def measure_torch(problem: Problem, attention_choices: Mapping[str, Any]) -> dict[str, Any]:
    """The ceilings as torch reaches them; see `measure_jax`.

    Args:
      problem: shapes, dtype and device.
      attention_choices: name -> (q [B, N, T, H], k and v [B, K, T, H]) -> [B, N, T, H]. One that raises RuntimeError
        is left out.
    """
    import torch

    dtype, device = getattr(torch, problem.dtype), problem.device
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32, generator=generator).to(dtype)

    def timed(call: Callable[[], Any]) -> float:
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        return _median_seconds(call, lambda _: wait(), problem)

    gemm = {}
    for name, product in products(problem).items():
        T, outputs, inputs = problem.sequence, product.outputs, product.inputs
        if product.equation == EQUATIONS["forward"]:
            left, right = random(T, inputs), random(outputs, inputs).T
        elif product.equation == EQUATIONS["input gradient"]:
            left, right = random(T, outputs), random(outputs, inputs)
        else:
            left, right = random(T, outputs).T, random(T, inputs)
        gemm[name] = product.flops(T) / timed(partial(torch.mm, left, right))

    q, k, v, gradient = (x.transpose(1, 2) for x in _attention_operands(problem, random))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both_ways(attend: Callable) -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, gradient)

    seconds = {}
    for name, attend in attention_choices.items():
        try:
            seconds[f"torch {name}"] = timed(partial(both_ways, attend))
        except RuntimeError as error:
            report(event="note", text=f"torch has no attention by {name} here: {str(error).splitlines()[0]}")
    assert seconds, "torch has no fused attention for this device"
    source = torch.zeros(_copy_elements(problem), device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / timed(lambda: target.copy_(source))
    return {"gemm": gemm, "attention": seconds, "copy": copied}


def _attention_operands(problem: Problem, random: Callable) -> tuple:
    N, K, H = (problem.shape[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    T = problem.sequence
    return random(1, T, N, H), random(1, T, K, H), random(1, T, K, H), random(1, T, N, H)


def _copy_elements(problem: Problem) -> int:
    """Far more than any cache holds on a GPU."""
    return 1 << (30 if problem.device == "cuda" else 22)


def _median_seconds(call: Callable[[], Any], wait: Callable[[Any], Any], problem: Problem) -> float:
    """Of one call, over three runs of calls that are queued without waiting; the first call compiles."""
    window = 0.05 if problem.device == "cuda" else 0.005
    wait(call())
    start = time.perf_counter()
    wait(call())
    calls = max(1, min(200, int(window / max(time.perf_counter() - start, 1e-6))))
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        runs.append((time.perf_counter() - start) / calls)
    return sorted(runs)[1]
