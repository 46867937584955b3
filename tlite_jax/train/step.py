"""One optimizer step as one program: gradients under shard_map, the update on sharded arrays.

`train.gradients` writes the collectives out. Losses are sums, divided once by the global count.

Shapes: B sequences of the step, R of them on a device, T tokens, G groups of parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, ModelConfig, OptimizerConfig
from tlite_jax.errors import UserError
from tlite_jax.model import attention, decoder, layers
from tlite_jax.model.attention import Attend
from tlite_jax.model.fp8 import check_fp8, fp8_product
from tlite_jax.model.layers import Product
from tlite_jax.optimizer import Schedule
from tlite_jax.sharding import BATCH_SPEC, CONTEXT, DEVICES, FSDP, REPLICA, Collectives, partition_specs
from tlite_jax.train.compile_options import compile_options
from tlite_jax.train.context import across_context
from tlite_jax.train.gradients import Batch, Gradients
from tlite_jax.train.norms import group_norms
from tlite_jax.train.state import TrainState, abstract_state, shardings

ROWS, NORMS = "rows", "norms"  # the metrics that are arrays
Metrics = dict[str, jax.Array]  # scalars but for ROWS and NORMS; replicated
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


def select_product(execution: ExecutionConfig, mesh: Mesh) -> Product:
    """How the layers of a step multiply matrices. Raises UserError when the mesh's devices cannot do it so."""
    if not execution.fp8:
        return layers.product
    check_fp8(mesh.devices.flat[0])
    return fp8_product


def make_gradients(
    model: ModelConfig, execution: ExecutionConfig, mesh: Mesh, document_masking: bool
) -> Callable[[Any, Batch], tuple[Any, jax.Array]]:
    """(params, batch) -> (gradient of the loss summed over the whole batch, [B, 2] of its rows).

    Of each row, on every device, float32: its summed loss and its number of scored tokens.
    """
    collectives, product = Collectives.of(mesh, execution), select_product(execution, mesh)

    def local_gradients(params: Any, batch: Batch) -> tuple[Any, jax.Array]:
        length = batch["tokens"].shape[1] * mesh.shape[CONTEXT]
        attend = across_context(select_attention(model, execution, mesh, document_masking, length), mesh.shape[CONTEXT])
        gradients, rows_R2 = Gradients(model, execution, collectives, attend, product)(params, batch)
        return gradients, _all_rows(rows_R2, mesh.size // mesh.shape[CONTEXT])

    specs = partition_specs(decoder.param_specs(model))
    # check_vma=True would insert the replica reduction at every use, inside the layer loop; a test reads the program.
    return jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(specs, BATCH_SPEC),
        out_specs=(specs, PartitionSpec()),
        check_vma=False,
    )


def _all_rows(rows_R2: jax.Array, num_groups: int) -> jax.Array:
    """[B, 2] of the whole batch on every device, by one reduction; those that share rows add up their parts."""
    size = rows_R2.shape[0]
    rows_B2 = jax.numpy.zeros((size * num_groups, 2), rows_R2.dtype)
    place = size * jax.lax.axis_index((REPLICA, FSDP))
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(rows_B2, rows_R2, place, axis=0), DEVICES)


def make_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    execution: ExecutionConfig,
    mesh: Mesh,
    *,
    schedule: Schedule,
    document_masking: bool = False,
    norms: bool = False,
) -> Step:
    """Builds the jitted training step; its state argument is donated.

    Args:
      model, optimizer, execution: sections of the run's config.
      mesh: from `sharding.make_mesh`.
      schedule: learning rate as a function of the state's step.
      document_masking: attention stays inside a document; batches then carry segment_ids.
      norms: whether metrics have norms by group of parameters.

    Returns:
      (state, batch) -> (state, metrics): loss (nats a token), gradient_norm (before clipping), learning_rate, tokens
      (scored), skipped (1 where loss or gradient_norm is not finite: parameters, moments and their count stay as they
      were, and only the step, and with it the schedule, goes on; else 0), rows ([B, 2]: the summed loss and the scored
      tokens of each row) and, where asked for, norms ([3, G], of `train.norms`; the gradients' before clipping).
      Metrics are not read back here: that would wait for the step.
    """
    gradients_fn = make_gradients(model, execution, mesh, document_masking)
    mask = adamw.decay_mask(optimizer, decoder.param_specs(model))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        summed, rows_B2 = gradients_fn(state.params, batch)
        loss, count = jax.numpy.sum(rows_B2, axis=0)
        scored = jax.numpy.maximum(count, 1)  # every target of a batch may be masked
        with jax.named_scope("optimizer"):
            # One multiplication does both the mean over tokens and the clipping, inside the update's own loops.
            norm = adamw.global_norm(summed) / scored
            factor = adamw.clip_factor(norm, optimizer.max_gradient_norm) / scored
            gradients = jax.tree.map(lambda gradient: gradient * factor, summed)
            learning_rate = schedule(state.step)
            params, moments, changes = adamw.update(
                optimizer, gradients, state.optimizer, state.params, learning_rate, mask
            )
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
            ROWS: rows_B2,
        }
        if norms:
            of_gradients_G, of_params_G, of_changes_G = group_norms(model, mesh, summed, params, changes)
            # As the gradients were when their global norm was taken; a skipped step changes nothing.
            of_changes_G = jax.numpy.where(finite, of_changes_G, 0.0)
            metrics[NORMS] = jax.numpy.stack([of_gradients_G / scored, of_params_G, of_changes_G])
        return TrainState(state.step + 1, params, moments), metrics

    scalar = NamedSharding(mesh, PartitionSpec())
    outputs = shardings(abstract_state(model, mesh)), scalar
    options = compile_options(model, execution, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=outputs, compiler_options=options)
