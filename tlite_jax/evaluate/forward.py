"""The compiled forward passes of evaluation: rows over all devices of a mesh, parameters gathered from their shards.

Every device works on rows of its own, those that share a sequence in training too.

Shapes: B rows, T tokens, D embed, V vocab, K tokens kept of a distribution.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.evaluate.rows import Batch, Packing
from tlite_jax.loss import token_losses
from tlite_jax.model import attention, decoder
from tlite_jax.sharding import ROWS_SPEC, Collectives, make_gather, partition_specs

_AHEAD = 2  # batches whose results are still on the devices while the next is built and sent

Head = Callable[..., Any]  # (hidden [B, T, D], head [V, D], the batch's arrays) -> arrays [B, T, ...]


def rows_at_a_time(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the devices."""
    return -(-batch_size // mesh.size) * mesh.size


def make_pass(model: ModelConfig, execution: ExecutionConfig, mesh: Mesh, head: Head) -> Callable[[Any, Any], Any]:
    """Compiles a pass over rows.

    Args:
      model, execution, mesh: as for training; remat does not matter.
      head: what is computed from the hidden states of a device's rows.

    Returns:
      (stored parameters, {tokens, segment_ids, ...: [B, ...]}) -> what `head` returns, whole on every device.
    """
    graphdef = decoder.graphdef(model)
    gather = make_gather(decoder.logical_axes(model), Collectives.of(mesh, execution))

    def local(params: Any, batch: Any) -> Any:
        attend = attention.select_for(
            mesh.devices.flat[0],
            "auto",
            dtype=execution.compute_dtype,
            document_masking=True,  # rows hold several documents
            sequence_length=batch["tokens"].shape[1],
            head_dim=model.head_dim,
        )
        hidden_BTD, head_VD = nnx.merge(graphdef, params)(
            batch["tokens"], batch["segment_ids"], gather=gather, attend=attend
        )
        return head(hidden_BTD, head_VD, batch)

    specs = partition_specs(decoder.param_specs(model))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs, ROWS_SPEC), out_specs=ROWS_SPEC, check_vma=False)
    return jax.jit(sharded, out_shardings=NamedSharding(mesh, PartitionSpec()))


def loss_pass(model: ModelConfig, execution: ExecutionConfig, mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
    """The pass that gives -log p of every target, float32 [B, T], in nats."""

    def head(hidden_BTD: jax.Array, head_VD: jax.Array, batch: Any) -> jax.Array:
        return token_losses(hidden_BTD, head_VD, batch["targets"], chunk_tokens=execution.loss_chunk_tokens)

    return make_pass(model, execution, mesh, head)


def on_mesh(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows of a host array, which every process has, on the devices; each process sends only its own."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, ROWS_SPEC), lambda index: array[index])


def run_pass(
    compiled: Callable[[Any, Any], Any],
    params: Any,
    packing: Packing,
    mesh: Mesh,
    batch_size: int,
    extra: Callable[[int, int], dict[str, np.ndarray]] | None = None,
) -> Iterator[tuple[int, Batch, Any]]:
    """Runs a pass over all rows; the next batches are built and started while a result is waited for.

    Args:
      compiled: from `make_pass`.
      params: stored, sharded parameters.
      packing: the rows.
      mesh: the pass's.
      batch_size: rows at a time, a multiple of the devices.
      extra: (first row, rows) -> more arrays [rows, ...] of a batch.

    Yields:
      (first row, the rows, the result as numpy arrays) of each batch in order.
    """
    waiting: list[tuple[int, Batch, Any]] = []
    for first in range(0, len(packing), batch_size):
        batch = packing.batch(first, batch_size)
        arrays = {"tokens": batch.tokens, "targets": batch.targets, "segment_ids": batch.segment_ids}
        if extra is not None:
            arrays |= extra(first, batch_size)
        result = compiled(params, {name: on_mesh(array, mesh) for name, array in arrays.items()})
        waiting.append((first, batch, result))
        if len(waiting) > _AHEAD:
            yield _read(waiting.pop(0))
    for entry in waiting:
        yield _read(entry)


def _read(entry: tuple[int, Batch, Any]) -> tuple[int, Batch, Any]:
    first, batch, result = entry
    return first, batch, jax.tree.map(np.asarray, result)


def per_token(function: Callable[..., Any], chunk_tokens: int, *arrays_BTX: jax.Array) -> Any:
    """Applies a function to every token of arrays [B, T, ...], at most `chunk_tokens` tokens at a time.

    Args:
      function: of one token's entries, without the leading [B, T].
      chunk_tokens: whose results' intermediate values exist at once.
      arrays_BTX: its arguments.

    Returns:
      Its results, each [B, T, ...].
    """
    rows, length = arrays_BTX[0].shape[:2]
    flat = tuple(array.reshape(rows * length, *array.shape[2:]) for array in arrays_BTX)
    results = jax.lax.map(lambda token: function(*token), flat, batch_size=min(chunk_tokens, rows * length))
    return jax.tree.map(lambda x: jnp.reshape(x, (rows, length, *x.shape[1:])), results)
