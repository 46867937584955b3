"""A contender of the CPU benchmark: a process that answers questions on standard input with lines of JSON.

facts: FLOPs a token, and torch's BLAS. step: takes a step; seconds, CPU seconds and loss. matmul: FLOP/s of a float32
product of two 2048 x 2048 matrices. memory: bytes held at most. parts (ours alone): CPU seconds by part of a step.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SETTINGS = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "max_norm": 1.0}
ADAMW_DECAY = 0.1
SIZE, PRODUCTS = 2048, 5

Answer = dict[str, Any]


class Problem(NamedTuple):
    """The same in every process: the model's shape, its weights as numpy arrays, [B, T] int32 tokens."""

    model: Any
    params: Any
    tokens: np.ndarray


class Contender(NamedTuple):
    """How one framework does it.

    Attributes:
      step: takes a step on the problem's tokens, waits for it, and returns the loss.
      multiply: computes PRODUCTS products of square matrices and waits for them.
      blas: what multiplies matrices.
      parts: CPU seconds by part of a step.
    """

    step: Callable[[], float]
    multiply: Callable[[], None]
    blas: str
    parts: Callable[[], Answer]


def main() -> None:
    """Answers until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=("ours", "eager", "compile"))
    for option in ("layers", "batch", "sequence", "threads"):
        parser.add_argument(f"--{option}", type=int, default={"layers": 30, "sequence": 512}.get(option, 2))
    options, _ = parser.parse_known_args()
    if options.name == "ours" and hasattr(os, "sched_setaffinity"):
        # XLA's pool has as many threads as the process may use cores when jax first looks for devices.
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.threads]))
    problem = make_problem(options)
    contender = _ours(problem) if options.name == "ours" else _torch(problem, options)
    for question in sys.stdin:
        print(json.dumps(_answer(question.strip(), contender, problem)), flush=True)


def make_problem(options: argparse.Namespace) -> Problem:
    """Random weights at SmolLM2-135M's widths."""
    import jax

    from tlite_jax.config import ModelConfig
    from tlite_jax.model.decoder import init_params

    model = ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    params = jax.tree.map(np.array, init_params(model, 0))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (options.batch, options.sequence), dtype=np.int32)
    return Problem(model, params, tokens)


def _answer(question: str, contender: Contender, problem: Problem) -> Answer:
    if question == "facts":
        from tlite_jax.telemetry.throughput import flops_per_token

        flops = flops_per_token(problem.model, problem.tokens.shape[1]).mfu_causal
        return {"flops_per_token": flops, "blas": contender.blas}
    if question == "memory":
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if question == "parts":
        return contender.parts()
    assert question in ("step", "matmul"), question
    if question == "matmul":
        contender.multiply()
    cpu, start = time.process_time(), time.perf_counter()
    result = contender.step() if question == "step" else contender.multiply()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    if question == "step":
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": result}
    # With the one before, which was not timed: of the turn's own CPU time they are both.
    return {"flops": PRODUCTS * 2 * SIZE**3 / seconds, "cpu_seconds": 2 * cpu_seconds}


def _ours(problem: Problem) -> Contender:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from bench import _cpu_parts
    from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig
    from tlite_jax.sharding import BATCH_SPEC, make_mesh
    from tlite_jax.train.state import start_state
    from tlite_jax.train.step import make_step

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = OptimizerConfig(
        learning_rate=SETTINGS["learning_rate"],
        beta1=SETTINGS["beta1"],
        beta2=SETTINGS["beta2"],
        eps=SETTINGS["eps"],
        weight_decay=ADAMW_DECAY * SETTINGS["learning_rate"],
        max_gradient_norm=SETTINGS["max_norm"],
    )
    execution = ExecutionConfig(compute_dtype="float32", loss_chunk_tokens=512)
    step_fn = make_step(
        problem.model, optimizer, execution, mesh, schedule=lambda _: jnp.float32(SETTINGS["learning_rate"])
    )
    state = start_state(jax.device_put(problem.params, NamedSharding(mesh, PartitionSpec())), None, mesh)
    tokens = problem.tokens
    targets = np.concatenate([tokens[:, 1:], np.full((len(tokens), 1), -1, np.int32)], axis=1)

    def step() -> float:
        nonlocal state
        batch = jax.device_put({"tokens": tokens, "targets": targets}, NamedSharding(mesh, BATCH_SPEC))
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    operand = jnp.ones((SIZE, SIZE), jnp.float32)
    product = jax.jit(lambda a: a @ a)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            product(operand).block_until_ready()

    return Contender(
        step, multiply, "XLA", lambda: _cpu_parts.measure(problem.model, optimizer, execution, tokens.shape, step)
    )


def _torch(problem: Problem, options: argparse.Namespace) -> Contender:
    import torch

    from bench import _torch_baseline

    step = _torch_baseline.build(
        problem.model,
        problem.params,
        learning_rate=SETTINGS["learning_rate"],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["eps"],
        weight_decay=ADAMW_DECAY,
        max_norm=SETTINGS["max_norm"],
        threads=options.threads,
        compile=options.name == "compile",
    )
    operand, out = torch.ones(SIZE, SIZE), torch.empty(SIZE, SIZE)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.matmul(operand, operand, out=out)

    return Contender(lambda: step(problem.tokens), multiply, _torch_baseline.blas(), dict)


if __name__ == "__main__":
    main()
