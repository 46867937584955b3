"""What XLA is told beyond its defaults: one place, by platform, a reason each."""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.model.decoder import block_specs
from tlite_jax.sharding import num_shards

Options = dict[str, bool | int | str]
MARGIN = 1 << 20  # bytes, for the padding of shards
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
TPU: Options = {
    # Where a chip has SparseCores (v5p, v6e, 7x) they carry the collectives, and products go on beside: without these
    # only the 7x does so, and elsewhere reduce-scatters and sums over replicas have no start and no end at all. A group
    # of devices may lie along one axis of the slice, in a plane or in a cube.
    f"{_OFFLOAD}all_gather": True,
    f"{_OFFLOAD}2d_all_gather": True,
    f"{_OFFLOAD}3d_all_gather": True,
    f"{_OFFLOAD}reduce_scatter": True,
    f"{_OFFLOAD}all_reduce": True,
    # All that is ready queues up for the SparseCores at once; otherwise the scheduler starts one as another ends.
    "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": True,
    # Where it has none (v5e), gathers of weights go on beside products, several products long; otherwise libtpu ends
    # each before the next begins. (Fusing reduce-scatters too does not fit into vector memory at 8B's widths.)
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
}


def compile_options(model: ModelConfig, execution: ExecutionConfig, mesh: Mesh) -> Options:
    """The options with which to compile a step for a mesh; those that its XLA does not know are left out.

    Args:
      model, execution: sections of the run's config.
      mesh: of the devices to compile for, which may be described ones (`jax.experimental.topologies`).
    """
    # One of this process's own: a program for another's cannot be compiled here alone.
    own = (device for device in mesh.devices.flat if device.process_index == jax.process_index())
    device = next(own, mesh.devices.flat[0])
    if device.platform in ("gpu", "cuda"):
        return _known(_gpu(model, execution, num_shards(mesh)), device)
    return _known(TPU, device) if device.platform == "tpu" else {}


def _gpu(model: ModelConfig, execution: ExecutionConfig, shards: int) -> Options:
    layer = sum(math.prod(spec.shape) for spec in block_specs(model).values())

    def layer_bytes(dtype: str, parts: int = 1) -> int:
        return layer * jnp.dtype(dtype).itemsize // parts + MARGIN

    options: Options = {
        # Starts a collective early and ends it late, so that products run meanwhile.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # A layer's gather, its reduce-scatter and its sum over replicas are under way together: without these two,
        # one waits for the other, and starts where the scheduler guesses that its time suffices.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
        "xla_gpu_experimental_collective_start_as_early_as_possible": True,
        # A layer's parameters travel as one message, and not more than a layer's.
        "xla_gpu_all_gather_combine_threshold_bytes": layer_bytes(execution.compute_dtype),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": layer_bytes(execution.reduce_dtype),
        "xla_gpu_all_reduce_combine_threshold_bytes": layer_bytes(execution.replica_reduce_dtype, shards),
        # Percent of the memory that XLA thinks free. Where it sees too little it recomputes and gives up scheduling,
        # which made the program larger by half in what we compiled. Whether a step fits, `plan` says.
        "xla_gpu_memory_limit_slop_factor": 1000,
    }
    if execution.deterministic:
        # No atomic sums (the embedding's gradient has them), and no algorithm chosen by timing.
        options |= {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0}
    return options


def _known(options: Options, device: jax.Device) -> Options:
    """The options that the device's compiler takes; they come and go with versions of XLA."""
    known = {name: value for name, value in options.items() if _takes(device, name, value)}
    if unknown := sorted(options.keys() - known.keys()):
        logging.getLogger(__name__).warning(
            "this XLA does not know %s: collectives may overlap less", ", ".join(unknown)
        )
    return known


@functools.cache
def _takes(device: jax.Device, name: str, value: Any) -> bool:
    sharding = NamedSharding(Mesh([device], ("one",)), PartitionSpec())
    lowered = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding))
    try:
        lowered.compile(compiler_options={name: value})
    except Exception as error:
        if name not in str(error):
            raise
        return False
    return True
