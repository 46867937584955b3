"""Our training step against Hugging Face transformers + torch, side by side on this machine's CPU.

    python bench/cpu_step.py                # the 135M model, about 10 minutes on 2 cores
    python bench/cpu_step.py --layers 4 --repeats 3

Same model (SmolLM2-135M's widths, random weights), same tokens, float32, AdamW and clipping in both; steps are taken
in turns (ours, torch eager, torch.compile, ours, ...) and medians compared, since machines are noisy. Each contender
lives in its own process, so that thread pools and memory are its own; only one works at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SETTINGS = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "max_norm": 1.0}
ADAMW_DECAY = 0.1


def main() -> None:
    """Runs the contenders in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--worker", choices=("ours", "eager", "compile"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return
    names = ["ours", "eager"] + ([] if options.no_compile else ["compile"])
    contenders = {name: _Contender(name) for name in names}
    for name, contender in contenders.items():
        first = contender.ask("step")
        print(f"{name}: first step, compiled, {first['seconds']:.1f} s, loss {first['loss']:.5f}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for turn in range(options.repeats):
        for name, contender in contenders.items():
            answer = contender.ask("step")
            times[name].append(answer["seconds"])
            losses[name] = answer["loss"]
            rates[name].append(contender.ask("matmul")["flops"])
        print(f"turn {turn + 1}: " + ", ".join(f"{name} {times[name][-1]:.2f} s" for name in names), flush=True)
    memory = {name: contender.ask("memory")["bytes"] for name, contender in contenders.items()}
    _report(options, times, rates, losses, memory, contenders["ours"].ask("flops")["flops"])
    for contender in contenders.values():
        contender.close()


def _report(
    options: argparse.Namespace,
    times: dict[str, list[float]],
    rates: dict[str, list[float]],
    losses: dict[str, float],
    memory: dict[str, int],
    flops_per_token: float,
) -> None:
    tokens = options.batch * options.sequence
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{options.layers} layers, {options.batch} x {options.sequence} tokens, {options.threads} threads, float32")
    print("| | tokens/s | ours / it | share of its own matmul rate | matmul GFLOP/s | peak memory GB | loss |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in medians.items():
        rate = statistics.median(rates[name])
        # Ratios of neighbours in time, so that a slow minute counts for both.
        ratio = statistics.median(other / ours for ours, other in zip(times["ours"], times[name], strict=True))
        share = flops_per_token * tokens / seconds / rate
        print(
            f"| {name} | {tokens / seconds:.0f} | {ratio:.2f} | {share:.0%} | {rate / 1e9:.0f} "
            f"| {memory[name] / 1e9:.2f} | {losses[name]:.5f} |"
        )


class _Contender:
    """A process that takes a step when asked."""

    def __init__(self, name: str):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a contender ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _work(options: argparse.Namespace) -> None:
    """Answers questions on standard input until it ends."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    model, params, tokens = _problem(options)
    if options.worker == "ours":
        step, matmul_rate = _ours(options, model, params)
    else:
        step, matmul_rate = _torch(options, model, params)
    del params
    for question in sys.stdin:
        answer: dict[str, float]
        match question.strip():
            case "step":
                start = time.perf_counter()
                loss = step(tokens)
                answer = {"seconds": time.perf_counter() - start, "loss": loss}
            case "matmul":
                answer = {"flops": matmul_rate()}
            case "memory":
                answer = {"bytes": _peak_memory()}
            case _:
                from tlite_jax.telemetry.throughput import flops_per_token

                answer = {"flops": flops_per_token(model, options.sequence).mfu_causal}
        print(json.dumps(answer), flush=True)


def _peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _problem(options: argparse.Namespace) -> tuple:
    """The model's shape, its weights as numpy arrays and a batch of tokens: the same in every process."""
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
    import jax

    params = jax.tree.map(np.asarray, init_params(model, 0))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (options.batch, options.sequence), dtype=np.int32)
    return model, params, tokens


def _ours(options: argparse.Namespace, model: object, params: dict) -> tuple[Callable, Callable]:
    # The thread pool is made when jax looks for devices: as many threads as the process may use cores.
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.threads]))
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig
    from tlite_jax.sharding import BATCH_SPEC, make_mesh
    from tlite_jax.train.state import start_state
    from tlite_jax.train.step import make_step

    mesh = make_mesh(MeshConfig())
    optimizer = OptimizerConfig(
        learning_rate=SETTINGS["learning_rate"],
        beta1=SETTINGS["beta1"],
        beta2=SETTINGS["beta2"],
        eps=SETTINGS["eps"],
        weight_decay=ADAMW_DECAY * SETTINGS["learning_rate"],
        max_gradient_norm=SETTINGS["max_norm"],
    )
    execution = ExecutionConfig(compute_dtype="float32", loss_chunk_tokens=256)
    step_fn = make_step(model, optimizer, execution, mesh, schedule=lambda step: SETTINGS["learning_rate"])  # type: ignore[arg-type]
    placed = jax.device_put(params, NamedSharding(mesh, jax.sharding.PartitionSpec()))
    state = start_state(placed, None, mesh)

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        targets = np.concatenate([tokens[:, 1:], np.full((len(tokens), 1), -1, np.int32)], axis=1)
        batch = jax.device_put({"tokens": tokens, "targets": targets}, NamedSharding(mesh, BATCH_SPEC))
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    size = 2048
    operand = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)

    def matmul_rate() -> float:
        multiply(operand).block_until_ready()
        start = time.perf_counter()
        for _ in range(5):
            result = multiply(operand)
        result.block_until_ready()
        return 5 * 2 * size**3 / (time.perf_counter() - start)

    return step, matmul_rate


def _torch(options: argparse.Namespace, model: object, params: dict) -> tuple[Callable, Callable]:
    import _torch_baseline

    step = _torch_baseline.build(
        model,
        params,
        learning_rate=SETTINGS["learning_rate"],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["eps"],
        weight_decay=ADAMW_DECAY,
        max_norm=SETTINGS["max_norm"],
        threads=options.threads,
        compile=options.worker == "compile",
    )
    return step, lambda: _torch_baseline.matmul_rate_torch(options.threads)


if __name__ == "__main__":
    main()
