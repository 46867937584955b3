"""One optimizer step as one program: gradients under shard_map, the update on sharded arrays.

`train.gradients` writes the collectives out. Losses are sums, divided once by the global count.

Shapes: B sequences of the step, T tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, ModelConfig, OptimizerConfig
from tlite_jax.errors import UserError
from tlite_jax.model import attention, decoder
from tlite_jax.model.attention import Attend
from tlite_jax.optimizer import Schedule
from tlite_jax.sharding import BATCH_SPEC, CONTEXT, DEVICES, Collectives, partition_specs
from tlite_jax.train.compile_options import compile_options
from tlite_jax.train.context import across_context
from tlite_jax.train.gradients import Batch, Gradients
from tlite_jax.train.state import TrainState, abstract_state, shardings

Metrics = dict[str, jax.Array]  # scalars
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def check_batch(batch_size: int, mesh: Mesh, num_microbatches: int) -> None:
    """Raises UserError when sequences cannot be dealt out evenly; names batch sizes that can."""
    groups = mesh.size // mesh.shape[CONTEXT]
    unit = groups * num_microbatches
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        fits = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(
            f"train.batch_size {batch_size} is not divisible by {groups} devices x {num_microbatches} microbatches "
            f"(execution.num_microbatches); use {fits}"
        )


def select_attention(
    model: ModelConfig, execution: ExecutionConfig, mesh: Mesh, document_masking: bool, sequence_length: int
) -> Attend:
    """The attention of a step on a mesh. Raises UserError when the one asked for cannot do it."""
    return attention.select_for(
        mesh.devices.flat[0],
        execution.attention,
        dtype=execution.compute_dtype,
        document_masking=document_masking,
        sequence_length=sequence_length,
        head_dim=model.head_dim,
    )


def make_gradients(
    model: ModelConfig, execution: ExecutionConfig, mesh: Mesh, document_masking: bool
) -> Callable[[Any, Batch], tuple[Any, jax.Array, jax.Array]]:
    """(params, batch) -> (gradient of the summed loss, summed loss, scored tokens), summed over the whole batch."""
    collectives = Collectives.of(mesh, execution)

    def local_gradients(params: Any, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
        length = batch["tokens"].shape[1] * mesh.shape[CONTEXT]
        attend = across_context(select_attention(model, execution, mesh, document_masking, length), mesh.shape[CONTEXT])
        gradients, loss, count = Gradients(model, execution, collectives, attend)(params, batch)
        return gradients, jax.lax.psum(loss, DEVICES), jax.lax.psum(count, DEVICES)

    specs = partition_specs(decoder.param_specs(model))
    scalar = PartitionSpec()
    # check_vma=True would insert the replica reduction at every use, inside the layer loop; a test reads the program.
    return jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(specs, BATCH_SPEC),
        out_specs=(specs, scalar, scalar),
        check_vma=False,
    )


def make_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    execution: ExecutionConfig,
    mesh: Mesh,
    *,
    schedule: Schedule,
    document_masking: bool = False,
) -> Step:
    """Builds the jitted training step; its state argument is donated.

    Args:
      model, optimizer, execution: sections of the run's config.
      mesh: from `sharding.make_mesh`.
      schedule: learning rate as a function of the state's step.
      document_masking: attention stays inside a document; batches then carry segment_ids.

    Returns:
      (state, batch) -> (state, metrics): loss (nats a token), gradient_norm (before clipping), learning_rate, tokens
      (scored), skipped (1 where loss or gradient_norm is not finite: parameters, moments and their count stay as they
      were, and only the step, and with it the schedule, goes on; else 0). Metrics are not read back here: that would
      wait for the step.
    """
    gradients_fn = make_gradients(model, execution, mesh, document_masking)
    mask = adamw.decay_mask(optimizer, decoder.param_specs(model))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, loss, count = gradients_fn(state.params, batch)
        scored = jax.numpy.maximum(count, 1)  # every target of a batch may be masked
        with jax.named_scope("optimizer"):
            # One multiplication does both the mean over tokens and the clipping, inside the update's own loops.
            norm = adamw.global_norm(gradients) / scored
            factor = adamw.clip_factor(norm, optimizer.max_gradient_norm) / scored
            gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
            learning_rate = schedule(state.step)
            params, moments = adamw.update(optimizer, gradients, state.optimizer, state.params, learning_rate, mask)
            # The norm is over all devices, so all choose alike; the choice is part of the update's loops, in place.
            finite = jax.numpy.isfinite(loss) & jax.numpy.isfinite(norm)
            params, moments = jax.tree.map(
                lambda new, old: jax.numpy.where(finite, new, old), (params, moments), (state.params, state.optimizer)
            )
        metrics = {
            "loss": loss / scored,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "tokens": count,
            "skipped": jax.numpy.where(finite, 0.0, 1.0),
        }
        return TrainState(state.step + 1, params, moments), metrics

    scalar = NamedSharding(mesh, PartitionSpec())
    outputs = shardings(abstract_state(model, mesh)), scalar
    options = compile_options(model, execution, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=outputs, compiler_options=options)
