"""Compiles the train step of a config for described devices, from abstract arrays, and reads what came out."""

import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from tlite_jax import optimizer
from tlite_jax.config import ExecutionConfig, ModelConfig, RunConfig
from tlite_jax.errors import UserError
from tlite_jax.model import attention
from tlite_jax.plan.audit import Intent, collectives, parameter_bytes
from tlite_jax.plan.hlo import Module
from tlite_jax.plan.program import Memory, Program
from tlite_jax.plan.work import Executed, Kernels
from tlite_jax.sharding import BATCH_SPEC, CONTEXT, REPLICA, make_mesh, num_shards
from tlite_jax.telemetry.throughput import flops_per_token
from tlite_jax.train.context import check_context
from tlite_jax.train.state import abstract_state
from tlite_jax.train.step import check_batch, make_step, select_attention


def compile_program(config: RunConfig, devices: Sequence[jax.Device], *, devices_per_node: int) -> Program:
    """Compiles the very step that `train` runs.

    Args:
      config: with a model.
      devices: real or described (`jax.experimental.topologies`).
      devices_per_node: consecutive devices that share a fast network.

    Raises:
      UserError: no model, or a mesh or batch that does not fit the devices.
    """
    if config.model is None:
        raise UserError("model is not known: give model, or an init_from that exists")
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.train.batch_size, mesh, config.execution.num_microbatches)
    context = mesh.shape[CONTEXT]
    check_context(config.model, context, config.data.sequence_length)
    start = time.monotonic()
    compiled = _lower(config, config.model, mesh).compile()
    seconds = time.monotonic() - start
    rows = config.train.batch_size // (mesh.size // context)
    length, masks = config.data.sequence_length, config.data.has_segments
    sequences = rows // config.execution.num_microbatches
    intent = Intent(
        config.model,
        config.execution,
        num_replicas=mesh.shape[REPLICA],
        num_shards=num_shards(mesh),
        num_context=context,
        microbatch_tokens=sequences * length // context,
        batch_rows=config.train.batch_size,
    )
    text = compiled.as_text()
    assert text is not None
    module = Module(text)
    backend = attention.backend_name(select_attention(config.model, config.execution, mesh, masks, length))
    shape = sequences, length, config.model.num_attention_heads // context, config.model.head_dim
    executed = Executed(module, Kernels.of(module, backend, shape, masks))
    found, violations = collectives(
        module, intent, executed.flops, devices_per_node=devices_per_node, fp8_flops=executed.fp8_flops
    )
    shard_bytes = parameter_bytes(config.model, intent.num_shards)
    return Program(
        num_devices=mesh.size,
        num_nodes=math.ceil(mesh.size / devices_per_node),
        num_microbatches=config.execution.num_microbatches,
        tokens_per_device=rows * length // context,
        compile_seconds=seconds,
        memory=_memory(compiled, config.model, config.execution, intent),
        work=executed.work(
            config.model,
            needed_flops=flops_per_token(config.model, length).mfu_causal * rows * length / context,
            shard_bytes=shard_bytes,
        ),
        collectives=found,
        minimum_wire_bytes=intent.minimum_wire_bytes(),
        violations=violations,
    )


def _lower(config: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    # How long the schedule is changes a constant of the program, no more.
    schedule = optimizer.make_schedule(config.schedule, config.optimizer.learning_rate, config.train.steps or 1_000_000)
    step = make_step(
        model,
        config.optimizer,
        config.execution,
        mesh,
        schedule=schedule,
        document_masking=config.data.has_segments,
        norms=config.telemetry.norms_every > 0,
    )
    rows = jax.ShapeDtypeStruct(
        (config.train.batch_size, config.data.sequence_length), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC)
    )
    names = ("tokens", "targets", "segment_ids") if config.data.has_segments else ("tokens", "targets")
    return step.lower(abstract_state(model, mesh), dict.fromkeys(names, rows))  # type: ignore[attr-defined]


def _memory(compiled: jax.stages.Compiled, model: ModelConfig, execution: ExecutionConfig, intent: Intent) -> Memory:
    stats = compiled.memory_analysis()
    assert stats is not None
    shard_bytes = parameter_bytes(model, intent.num_shards)
    unaliased = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        arguments_bytes=stats.argument_size_in_bytes,
        temporaries_bytes=stats.temp_size_in_bytes,
        peak_bytes=stats.argument_size_in_bytes + stats.temp_size_in_bytes + unaliased,
        parameters_bytes=shard_bytes,
        optimizer_bytes=2 * shard_bytes,
        gradients_bytes=shard_bytes,
        expected_temporaries_bytes=expected_temporaries(model, execution, intent.microbatch_tokens) + shard_bytes,
    )


def expected_temporaries(model: ModelConfig, execution: ExecutionConfig, tokens: int) -> int:
    """Bytes that a microbatch of so many tokens needs on a device, gradient shards aside.

    What each layer keeps for its backward pass and its input; two layers' weights; the head's; one chunk of logits.
    Under `offload` what is in host memory is not counted; `none` has no such figure and is given that of `dots`.
    """
    width = jnp.dtype(execution.compute_dtype).itemsize
    heads, kv_heads = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    attended, products = heads, heads + 2 * kv_heads + 2 * model.hidden_size + 2 * model.intermediate_size
    kept = {"full": 0, "attention": attended, "offload": attended}.get(execution.remat, attended + products)
    layer = model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.intermediate_size)
    return (
        model.num_hidden_layers * tokens * (kept + model.hidden_size) * width
        + 2 * layer * width
        + model.vocab_size * model.hidden_size * width
        + min(execution.loss_chunk_tokens, tokens) * model.vocab_size * 4
    )
