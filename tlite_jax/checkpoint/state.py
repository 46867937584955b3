"""The arrays of a checkpoint: opened, or read into their shards on a mesh."""

from typing import Any

from jax.sharding import Mesh

from tlite_jax.checkpoint.reader import Reading, Target, read_sharded
from tlite_jax.checkpoint.slices import open_arrays
from tlite_jax.checkpoint.stored import Checkpoint
from tlite_jax.checkpoint.unite import unite
from tlite_jax.errors import UserError
from tlite_jax.model.decoder import param_specs
from tlite_jax.optimizer import AdamState
from tlite_jax.sharding import abstract_params
from tlite_jax.train.state import abstract_state


def open_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """Opens the parameters without reading them: a nested dict of arrays of logical shapes, read slice by slice.

    They slice like numpy's, and `numpy.asarray` reads what is left. Checkpoints of earlier versions are not stored for
    it: a slice of theirs takes the memory of the whole parameter.
    """
    return open_arrays(checkpoint.path / "params", param_specs(checkpoint.meta.model))


def restore_params(checkpoint: Checkpoint, mesh: Mesh, dtype: str = "float32") -> Any:
    """Reads the parameters into their shards on a mesh, padded for it whatever they were padded for."""
    return read_sharded(checkpoint.path / "params", abstract_params(param_specs(checkpoint.meta.model), mesh, dtype))


def restore_optimizer(checkpoint: Checkpoint, mesh: Mesh) -> AdamState:
    """Reads Adam's moments into their shards on a mesh.

    Raises:
      UserError: the checkpoint has none.
    """
    if not checkpoint.has_optimizer:
        raise UserError(f"{checkpoint.path} holds no optimizer state; use init_from.optimizer: reset")
    abstract = abstract_state(checkpoint.meta.model, mesh).optimizer
    return AdamState(**read_sharded(checkpoint.path / "optimizer", abstract._asdict()))


class StateReading:
    """Parameters and moments of a checkpoint on their way into their shards on a mesh.

    Args:
      checkpoint: with an optimizer; a part goes to the mesh that it was saved on, and all processes read theirs.
      mesh: where they go.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh) -> None:
        wanted = abstract_state(checkpoint.meta.model, mesh)
        self._path, self._mesh = checkpoint.path.absolute(), mesh
        self._is_part = checkpoint.part is not None
        self._params = Reading(self._path / "params", wanted.params, checkpoint.part)
        self._optimizer = Reading(self._path / "optimizer", wanted.optimizer._asdict(), checkpoint.part)
        self.bytes = self._params.bytes + self._optimizer.bytes
        self.filled: frozenset[str] = frozenset()  # names of the files that have been read into their places
        self._finished = False

    def targets(self) -> dict[str, list[Target]]:
        """By name of a file, where its bytes belong."""
        found = {**self._params.targets(), **self._optimizer.targets()}
        return {file.relative_to(self._path).as_posix(): targets for file, targets in found.items()}

    def is_of(self, checkpoint: Checkpoint, mesh: Mesh) -> bool:
        """Whether it can be finished for these."""
        return not self._finished and self._path == checkpoint.path.absolute() and self._mesh == mesh

    def finish(self) -> tuple[Any, AdamState]:
        """Reads what has not been read; to be called once."""
        self._finished = True
        filled = {self._path / name for name in self.filled}
        params, moments = self._params.finish(filled), self._optimizer.finish(filled)
        if self._is_part:
            params, moments = unite((params, moments), self._mesh)
        return params, AdamState(**moments)
