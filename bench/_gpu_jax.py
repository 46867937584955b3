"""Our step in `gpu_step.py`, run as a process of its own: timed on this machine's device, or compiled for another.

Shapes: M microbatches, T tokens.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bench import _gpu_problem as given
from bench._ceilings import measure_jax
from bench._gpu_problem import Problem, report
from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, MeshConfig, ModelConfig, OptimizerConfig
from tlite_jax.model import decoder
from tlite_jax.sharding import BATCH_SPEC, make_mesh
from tlite_jax.train.state import TrainState, abstract_state, shardings, start_state
from tlite_jax.train.step import make_step


def optimizer_config(problem: Problem) -> OptimizerConfig:
    """Torch's AdamW in our words: its decay is multiplied by the learning rate, ours is not."""
    return OptimizerConfig(
        learning_rate=problem.learning_rate,
        beta1=problem.beta1,
        beta2=problem.beta2,
        eps=problem.eps,
        weight_decay=problem.weight_decay * problem.learning_rate,
        max_gradient_norm=problem.max_norm,
    )


def step_fn(problem: Problem, model: ModelConfig, mesh: Mesh) -> Any:
    """The jitted step that `launch train` runs, at the problem's settings."""
    settings = {
        "compute_dtype": problem.dtype,
        "num_microbatches": problem.microbatches,
        "loss_chunk_tokens": problem.chunk_tokens,
        **problem.execution,
    }
    execution = ExecutionConfig(**settings)
    schedule = lambda step: jnp.float32(problem.learning_rate)  # noqa: E731
    return make_step(model, optimizer_config(problem), execution, mesh, schedule=schedule, document_masking=False)


def make_weights(model: ModelConfig, mesh: Mesh) -> Any:
    """The float32 weights that `_gpu_problem` defines, made on the mesh."""
    abstract = abstract_state(model, mesh).params

    def weight(path: Any, leaf: Any) -> jax.Array:
        name, stacked = path[-1].key, path[0].key == "blocks"
        layers = range(leaf.shape[0]) if stacked else [0]
        salts = np.asarray([given.salt(name, layer) for layer in layers], np.uint32)
        size = math.prod(leaf.shape) // len(salts)
        x = jax.lax.broadcasted_iota(jnp.uint32, (len(salts), size), 1) * np.uint32(given.MULTIPLIERS[0])
        x += salts[:, None]
        for shift, multiplier in zip(given.SHIFTS[:2], given.MULTIPLIERS[1:], strict=True):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(multiplier)
        uniform = ((x ^ (x >> np.uint32(given.SHIFTS[2]))) >> np.uint32(8)).astype(jnp.float32) * 2.0**-24 - 0.5
        width = given.NORM_WIDTH if given.is_norm(name) else given.MATRIX_WIDTH
        return (uniform * width + np.float32(given.is_norm(name))).reshape(leaf.shape)

    make = jax.jit(lambda: jax.tree.map_with_path(weight, abstract), out_shardings=shardings(abstract))
    return make()


def place_batch(problem: Problem, mesh: Mesh) -> dict[str, jax.Array]:
    """Tokens and targets, [M, T] int32 on the mesh."""
    tokens, targets = problem.batch()
    return jax.device_put({"tokens": tokens, "targets": targets}, NamedSharding(mesh, BATCH_SPEC))


def measure(problem: Problem, layers: int, mesh: Mesh) -> tuple[dict[str, Any], TrainState, Any]:
    """Compiles, takes timed steps. Returns what to report, the state and the compiled step."""
    model = problem.model(layers)
    state = start_state(make_weights(model, mesh), None, mesh)
    batch = place_batch(problem, mesh)
    start = time.perf_counter()
    step = step_fn(problem, model, mesh).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    losses, seconds, norm = [], [], math.nan
    for index in range(problem.repeats + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
        norm = float(metrics["gradient_norm"]) if index == 0 else norm
    result = {
        "layers": layers,
        "first_seconds": compile_seconds + seconds[0],
        "seconds": seconds[1:],
        "losses": losses,
        "gradient_norm": norm,
        "peak_bytes": _peak_bytes(mesh),
        "compiled_bytes": compiled_bytes(step),
    }
    return result, state, step


def update_seconds(problem: Problem, layers: int, mesh: Mesh, state: TrainState) -> float:
    """The time of norm, clipping and AdamW alone. The state is used up."""
    config = optimizer_config(problem)
    mask = adamw.decay_mask(config, decoder.param_specs(problem.model(layers)))

    def update(state: TrainState, gradients: Any) -> TrainState:
        factor = adamw.clip_factor(adamw.global_norm(gradients), config.max_gradient_norm)
        gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
        rate = jnp.float32(problem.learning_rate)
        params, moments, _ = adamw.update(config, gradients, state.optimizer, state.params, rate, mask)
        return TrainState(state.step + 1, params, moments)

    call = jax.jit(update, donate_argnums=0)
    gradients = jax.jit(lambda params: jax.tree.map(lambda param: param * 1e-3, params))(state.params)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        state = jax.block_until_ready(call(state, gradients))
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[1]


def compiled_bytes(compiled: Any) -> dict[str, int]:
    """What the compiler says of memory: arguments, temporaries, and the peak (outputs lie on donated arguments)."""
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return {**sizes, "peak": sum(sizes.values()) + outputs}


def _peak_bytes(mesh: Mesh) -> int:
    """The most the device has held in this process, so of the largest depth yet; on a CPU, what the process has."""
    statistics = mesh.devices.flat[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or given.peak_host_bytes()


def save_target(directory: Path, depths: list[dict[str, Any]]) -> None:
    """Writes the device's own description for compilers, and the compiler's memory beside the device's."""
    directory.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    memory = [{key: depth[key] for key in ("layers", "compiled_bytes", "peak_bytes")} for depth in depths]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    facts = {"device_kind": device.device_kind, "bytes_limit": limit, "depths": memory}
    (directory / "memory.json").write_text(json.dumps(facts, indent=2) + "\n")
    try:
        from jaxlib import xla_client  # jax.lib.xla_client until jax 0.9

        target = xla_client.get_topology_for_devices(jax.devices()).target_config
    except (ImportError, AttributeError, RuntimeError) as error:
        report(event="note", text=f"no target description of {device.device_kind}: {error}")
        return
    name = "".join(letter if letter.isalnum() else "_" for letter in device.device_kind.lower())
    path = directory / f"{name}.txtpb"
    path.write_bytes(target if isinstance(target, bytes) else str(target).encode())
    report(event="note", text=f"target description written to {path}")


def run(problem: Problem) -> Iterator[dict[str, Any]]:
    """Measures ceilings, then every depth; yields what to report of each."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    yield {"event": "start", "version": f"jax {jax.__version__}", "device_kind": jax.devices()[0].device_kind}
    yield {"event": "ceilings", **measure_jax(problem)}
    depths = []
    for layers in given.depths_in_time(problem, "ours"):
        gc.collect()
        result, state, step = measure(problem, layers, mesh)
        if problem.profile and layers == problem.layers[-1]:
            with jax.profiler.trace(problem.profile):
                state, _ = jax.block_until_ready(step(state, place_batch(problem, mesh)))
        del step
        result["update_seconds"] = update_seconds(problem, layers, mesh, state)
        del state
        depths.append(result)
        yield {"event": "depth", **result}
    if problem.target:
        save_target(Path(problem.target), depths)


def compile_only(problem: Problem, hardware_name: str) -> Iterator[dict[str, Any]]:
    """Compiles every depth for one device of a described machine; yields the memory of each."""
    from tlite_jax.plan import topology

    directory = Path(__file__).resolve().parent.parent / "configs/hardware"
    hardware = topology.load_hardware(hardware_name, directory)
    one = hardware.model_copy(update={"devices_per_node": 1})
    mesh = make_mesh(MeshConfig(), topology.devices(one, 1))
    rows = jax.ShapeDtypeStruct(
        (problem.microbatches, problem.sequence), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC)
    )
    for layers in problem.layers:
        model = problem.model(layers)
        start = time.perf_counter()
        lowered = step_fn(problem, model, mesh).lower(abstract_state(model, mesh), {"tokens": rows, "targets": rows})
        compiled = lowered.compile()
        yield {
            "event": "compiled",
            "layers": layers,
            "seconds": time.perf_counter() - start,
            "compiled_bytes": compiled_bytes(compiled),
            "capacity_bytes": hardware.memory_bytes,
        }


def main() -> None:
    """Reports on standard output; a second argument names a machine to compile for."""
    problem = Problem.from_json(sys.argv[1])
    if len(sys.argv) > 2:
        messages = compile_only(problem, sys.argv[2])
    else:
        jax.config.update("jax_compilation_cache_dir", str(Path(problem.cache) / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        messages = run(problem)
    for message in messages:
        report(**message)


if __name__ == "__main__":
    main()
