"""Whether the devices that were found are those of the config's mesh, and which meshes they would make."""

import math
from typing import TYPE_CHECKING

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig

MOST_MESHES = 4


def check_world(config: "RunConfig", num_processes: int, devices_per_process: int) -> None:
    """Refuses devices that do not make up the config's mesh. (A batch that does not divide: `train.step.check_batch`.)

    Args:
      config: the run.
      num_processes, devices_per_process: what was found, or asked for.

    Raises:
      UserError: says both, and the words that would make it fit, the nearest first.
    """
    found = num_processes * devices_per_process
    mesh = config.mesh
    fsdp = mesh.fsdp or max(1, found // (mesh.replica * mesh.context))
    if mesh.replica * fsdp * mesh.context == found:
        return
    by_context = f" x context {mesh.context}" if mesh.context > 1 else ""
    wanted = f"replica {mesh.replica} x fsdp {mesh.fsdp or 'the rest'}{by_context}"
    if mesh.fsdp is not None:
        wanted += f" = {mesh.replica * mesh.fsdp * mesh.context} devices"
    microbatches = config.execution.num_microbatches
    raise UserError(
        f"mesh: {wanted} in the config, {num_processes} x {devices_per_process} = {found} devices found; "
        f"with train.batch_size {config.train.batch_size} in {microbatches} microbatches {_advice(config, found)}"
    )


def nearest_meshes(config: "RunConfig", num_devices: int) -> list[str]:
    """`section.field=value` words that make a config fit so many devices, the nearest to what it asks for first.

    Near is: the same fsdp, which decides the memory, then the next by ratio. Where the batch does not divide over the
    devices times the microbatches, the words change the microbatches: to as many as keep a microbatch as small.
    """
    context = config.mesh.context
    if num_devices % context:
        return []
    groups = num_devices // context
    if config.train.batch_size % groups:
        return []
    wanted = config.mesh.fsdp or max(1, groups // config.mesh.replica)
    sizes = [size for size in range(1, groups + 1) if groups % size == 0]
    sizes.sort(key=lambda size: (abs(math.log(size / wanted)), -size))
    rows = config.train.batch_size // groups
    microbatches = config.execution.num_microbatches
    more = ""
    if rows % microbatches:
        fits = [number for number in range(1, rows + 1) if rows % number == 0]
        nearest = next((number for number in fits if number >= microbatches), fits[-1])
        more = f" execution.num_microbatches={nearest}"
    return [f"mesh.replica={groups // size} mesh.fsdp={size}{more}" for size in sizes[:MOST_MESHES]]


def _advice(config: "RunConfig", num_devices: int) -> str:
    if meshes := nearest_meshes(config, num_devices):
        return f"these fit, nearest first: {'; '.join(meshes)}"
    context, batch_size = config.mesh.context, config.train.batch_size
    if num_devices % context:
        return f"none fits: mesh.context {context} does not divide {num_devices} devices; start a multiple of {context}"
    groups = num_devices // context
    below, above = batch_size // groups * groups, -(-batch_size // groups) * groups
    batches = " or ".join(f"train.batch_size={size}" for size in (below, above) if size)
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    near = sorted(divisors, key=lambda size: abs(math.log(size / groups)))[:2]
    counts = " or ".join(str(size * context) for size in sorted(near))
    return f"none fits: {batch_size} does not divide over {groups}; use {batches}, or {counts} devices"
