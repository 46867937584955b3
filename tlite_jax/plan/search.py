"""Other ways to run the same config: meshes that fit the devices, what to search, and what would make a run fit.

A variant is a list of `section.field=value` words. None of them changes what is learned but where it says so.
"""

import itertools
import typing
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from tlite_jax.config import ExecutionConfig, RunConfig
from tlite_jax.config_files import override
from tlite_jax.errors import UserError
from tlite_jax.plan.cost import Cost
from tlite_jax.plan.program import Program
from tlite_jax.plan.topology import Domain, Hardware
from tlite_jax.plan.worker import Failure

Words = tuple[str, ...]
Try = Callable[[Sequence[Words]], Generator[Program | Failure, None, None]]
Price = Callable[[Program, RunConfig], Cost]

# What a layer keeps, from the least to the most; offload keeps as dots does, elsewhere.
REMAT_BY_MEMORY = ("full", "attention", "offload", "dots", "none")
MOST_SEQUENCES = 4


@dataclass(frozen=True)
class Candidate:
    """A variant that compiled, and its price."""

    words: Words
    config: RunConfig
    program: Program
    cost: Cost

    @property
    def sequences(self) -> int:
        """In a microbatch, on a device."""
        groups = self.program.num_devices // self.config.mesh.context
        return self.config.train.batch_size // (groups * self.program.num_microbatches)


def default_nodes(config: RunConfig, hardware: Hardware) -> int:
    """The nodes that the config's mesh takes.

    Raises:
      UserError: the mesh takes whatever devices there are, or no whole number of nodes.
    """
    if config.mesh.fsdp is None:
        raise UserError("mesh.fsdp is null, all devices that there are: give --nodes, or mesh.fsdp=...")
    devices = config.mesh.replica * config.mesh.fsdp * config.mesh.context
    if devices % hardware.devices_per_node:
        raise UserError(
            f"mesh: {config.mesh.replica} x {config.mesh.fsdp} is {devices} devices, no whole number of nodes of "
            f"{hardware.devices_per_node}; {_meshes_that_fit(config, hardware, _nearest_nodes(devices, hardware))}"
        )
    return devices // hardware.devices_per_node


def check_mesh(config: RunConfig, hardware: Hardware, nodes: int) -> None:
    """Refuses a mesh that the nodes' devices do not make up.

    Raises:
      UserError: says both numbers and the meshes that fit.
    """
    devices = nodes * hardware.devices_per_node
    replica, fsdp, context = config.mesh.replica, config.mesh.fsdp, config.mesh.context
    shared = f" x context {context}" if context > 1 else ""
    if devices % (replica * context) if fsdp is None else replica * fsdp * context != devices:
        needs = f"replica {replica}{shared}"
        if fsdp is not None:
            needs = f"replica {replica} x fsdp {fsdp}{shared} = {replica * fsdp * context} devices"
        raise UserError(
            f"mesh: {needs}, but {nodes} nodes of {hardware.devices_per_node} are {devices}; "
            f"{_meshes_that_fit(config, hardware, [nodes])}"
        )


def check_batch(config: RunConfig, num_devices: int, num_microbatches: int) -> None:
    """Refuses a batch that cannot be dealt out evenly, as `train` would.

    Raises:
      UserError: names batch sizes that can.
    """
    groups, batch_size = num_devices // config.mesh.context, config.train.batch_size
    unit = groups * num_microbatches
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        fits = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(
            f"train.batch_size {batch_size} is not divisible by {groups} devices x {num_microbatches} "
            f"microbatches (execution.num_microbatches); use {fits}"
        )


def meshes(num_devices: int, domain: Domain, context: int = 1) -> list[tuple[int, int]]:
    """(replica, fsdp) worth trying: sharded within a domain, over two, over all; within a domain also over 8."""
    num_devices, inside = num_devices // context, max(1, domain.devices_per_domain // context)
    sizes = {inside, 2 * inside, num_devices} if inside < num_devices else {inside, 8}
    return [(num_devices // size, size) for size in sorted(sizes) if size <= num_devices and num_devices % size == 0]


def search(config: RunConfig, domain: Domain, attempt: Try, price: Price) -> tuple[list[Candidate], list[str]]:
    """Compiles microbatch x remat x mesh and ranks what fits by tokens a second.

    For each mesh and number of sequences in a microbatch the richest remat that fits: a leaner one recomputes more.
    What does not fit with fewer sequences is not tried with more.

    Args:
      config: the run; batch and sequence length stay.
      domain: the cluster.
      attempt: compiles variants, in order.
      price: of a program.

    Returns:
      Those that fit, the fastest first, and a line for each that did not compile for another reason than memory.
    """
    remats = _remats(config)
    richest = dict.fromkeys(meshes(domain.num_devices, domain, config.mesh.context), 0)
    found: list[Candidate] = []
    failures: list[str] = []
    for sequences in range(1, MOST_SEQUENCES + 1):
        microbatches = _words_of_microbatches(config, domain.num_devices, sequences)
        waiting = set(richest) if microbatches else set()
        while waiting := {mesh for mesh in waiting if richest[mesh] < len(remats)}:
            order = sorted(waiting)
            variants = [
                (
                    f"mesh.replica={replica}",
                    f"mesh.fsdp={fsdp}",
                    f"execution.remat={remats[richest[mesh]]}",
                    *microbatches,
                )
                for mesh in order
                for replica, fsdp in [mesh]
            ]
            for mesh, words, answer in zip(order, variants, attempt(variants), strict=True):
                if isinstance(answer, Program):
                    candidate = _candidate(config, words, answer, price)
                    if candidate.cost.fit.fits:
                        found.append(candidate)
                        waiting.remove(mesh)
                        continue
                elif not answer.is_memory:
                    failures.append(f"{' '.join(words)}: {answer.message}")
                richest[mesh] += 1
    return sorted(found, key=lambda each: -each.cost.tokens_per_second_per_device), failures


def remedies(config: RunConfig, num_devices: int, sequences: int) -> list[Words]:
    """Variants that take less memory, one change at a time and then together, on the same devices."""
    smaller = _words_of_microbatches(config, num_devices, 1) if sequences > 1 else ()
    groups = num_devices // config.mesh.context
    position = REMAT_BY_MEMORY.index(config.execution.remat)
    leaner = [(f"execution.remat={remat}",) for remat in ("attention", "full") if remat in REMAT_BY_MEMORY[:position]]
    fsdp = config.mesh.fsdp or groups // config.mesh.replica
    shards = ("mesh.replica=1", f"mesh.fsdp={groups}") if fsdp < groups else ()
    single = [smaller, *leaner, shards]
    together = [
        (*first, *second)
        for first, second in itertools.combinations([smaller, leaner[-1] if leaner else (), shards], 2)
    ]
    everything = (*smaller, *(leaner[-1] if leaner else ()), *shards)
    return list(dict.fromkeys(words for words in [*single, *together, everything] if words))


def remedy_on(config: RunConfig, num_devices: int) -> Words:
    """The leanest variant on other devices: full shard, full recomputation, one sequence at a time.

    Where the batch does not divide over that many devices it is rounded up, which changes what is learned.
    """
    groups = num_devices // config.mesh.context
    batch_size = -(-config.train.batch_size // groups) * groups
    batch = () if batch_size == config.train.batch_size else (f"train.batch_size={batch_size}",)
    shape = ("mesh.replica=1", f"mesh.fsdp={groups}", "execution.remat=full")
    return (*batch, *shape, f"execution.num_microbatches={batch_size // groups}")


def first_fits(
    config: RunConfig, variants: Sequence[Words], attempt: Try, price: Price, *, most: int
) -> list[Candidate]:
    """The first `most` variants that compile and fit, none of them a fitting one with further changes.

    They are compiled one by one, and no more of them than that takes.
    """
    fitting: list[Candidate] = []
    for words in variants:
        if len(fitting) == most:
            break
        if any(set(each.words) <= set(words) for each in fitting):
            continue
        (answer,) = attempt([words])
        if isinstance(answer, Program):
            candidate = _candidate(config, words, answer, price)
            fitting += [candidate] if candidate.cost.fit.fits else []
    return fitting


def _candidate(config: RunConfig, words: Words, program: Program, price: Price) -> Candidate:
    changed = override(config, words)
    return Candidate(words, changed, program, price(program, changed))


def _remats(config: RunConfig) -> list[str]:
    """From the richest to the leanest."""
    known = typing.get_args(ExecutionConfig.model_fields["remat"].annotation)
    # Offloading is for what does not fit otherwise, and its traffic to the host is not in the model.
    wanted = [remat for remat in REMAT_BY_MEMORY if remat != "offload" or config.execution.remat == remat]
    return [remat for remat in reversed(wanted) if remat in known]


def _words_of_microbatches(config: RunConfig, num_devices: int, sequences: int) -> Words:
    groups = num_devices // config.mesh.context
    if config.train.batch_size % (groups * sequences):
        return ()
    return (f"execution.num_microbatches={config.train.batch_size // (groups * sequences)}",)


def _nearest_nodes(devices: int, hardware: Hardware) -> list[int]:
    below = devices // hardware.devices_per_node
    return [nodes for nodes in (below, below + 1) if nodes > 0]


def _meshes_that_fit(config: RunConfig, hardware: Hardware, all_nodes: Iterable[int]) -> str:
    """The meshes nearest to the config's, for each number of nodes, as a sentence's end."""
    wanted = config.mesh.fsdp or hardware.devices_per_node
    sentences = []
    for nodes in all_nodes:
        devices = nodes * hardware.devices_per_node
        sizes = sorted(size for size in range(1, devices + 1) if devices % size == 0)
        nearest = sorted(sorted(sizes, key=lambda size: abs(size - wanted))[:3])
        shapes = " or ".join(f"mesh.replica={devices // size} mesh.fsdp={size}" for size in nearest)
        sentences.append(f"use {shapes} on {nodes} nodes")
    return ", or ".join(sentences)
