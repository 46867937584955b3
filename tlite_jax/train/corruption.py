"""Silent corruption: a device that computes something else than it should, or holds it, and reports no error.

At every `train.verify_every`-th step the step is computed twice from the same bits; at every
`train.compare_replicas_every`-th the replicas of all parameters and moments are compared. The program of a step is the
usual one. A copy of the state waits in host memory meanwhile, so that no device needs more memory than it has.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tlite_jax.errors import CorruptionError, UserError
from tlite_jax.sharding import REPLICA
from tlite_jax.train.anomalies import COMPUTED_TWICE, REPLICAS, Anomalies
from tlite_jax.train.digest import Differs, Digester, Digests
from tlite_jax.train.gradients import Batch
from tlite_jax.train.run import Run
from tlite_jax.train.state import TrainState
from tlite_jax.train.step import Metrics, Step


def checked(step_fn: Step, run: Run, mesh: Mesh, anomalies: Anomalies) -> Step:
    """The step with the checks that `train` asks for; itself when it asks for none.

    Raises:
      UserError: a check that cannot be made on this mesh or these devices.
    """
    train = run.config.train
    if train.compare_replicas_every and mesh.shape[REPLICA] == 1:
        raise UserError("train.compare_replicas_every needs two replicas, and mesh.replica is 1; set it to 0")
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    if train.verify_every and on_gpu and not run.config.execution.deterministic:
        raise UserError(
            "train.verify_every compares bits, and on GPUs a step may give others each time; "
            "set execution.deterministic: true, or train.verify_every to 0"
        )
    if not train.verify_every and not train.compare_replicas_every:
        return step_fn
    return _Checked(step_fn, run, mesh, anomalies)


class _Checked:
    """Called like the step, once for each."""

    def __init__(self, step_fn: Step, run: Run, mesh: Mesh, anomalies: Anomalies):
        self._step_fn, self._run, self._mesh, self._anomalies = step_fn, run, mesh, anomalies
        self._step = self._right_at = run.start_step
        self._digester: Digester | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        train = self._run.config.train
        self._step += 1
        digests: Digests | None = None
        if train.verify_every and self._step % train.verify_every == 0:
            state, metrics, digests = self._twice(state, batch)
        else:
            state, metrics = self._step_fn(state, batch)
        if train.compare_replicas_every and self._step % train.compare_replicas_every == 0 and digests is None:
            digests = self._digests(state, metrics)
        if digests is not None and self._digester is not None:
            if found := self._digester.among_replicas(digests):
                self._fail(REPLICAS, found, "replicas hold different bits")
            self._right_at = self._step
        return state, metrics

    def _digests(self, state: TrainState, metrics: Metrics) -> Digests:
        """Of the metrics too: where one process alone sees another loss, all must know, or the others go on."""
        tree = {**state._asdict(), "metrics": metrics}
        if self._digester is None:
            self._digester = Digester(self._mesh, tree)
        return self._digester(tree)

    def _twice(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, Digests]:
        copy = _to_host(state)
        first = self._digests(*self._step_fn(state, batch))
        del state  # its memory is needed for the second
        state, metrics = self._step_fn(_to_devices(copy), batch)
        digests = self._digests(state, metrics)
        if self._digester is not None and (found := self._digester.between(first, digests)):
            self._fail(COMPUTED_TWICE, found, "the same step on the same state gave different bits")
        return state, metrics, digests

    def _fail(self, kind: str, found: list[Differs], what: str) -> None:
        """Writes it down and raises CorruptionError."""
        arrays = [
            {"array": one.array, "devices": [str(device) for device in one.devices], "sure": one.sure} for one in found
        ]
        self._anomalies.note(self._step, {"kind": kind, "right_at": self._right_at, "arrays": arrays})
        devices = {device: device.process_index for one in found for device in one.devices}
        shown = ", ".join(f"{device} (process {process})" for device, process in list(devices.items())[:4])
        some = "one of these" if not all(one.sure for one in found) else "these"
        others = f" and {len(found) - 1} more arrays" if len(found) > 1 else ""
        rest = f" and {len(devices) - 4} more" if len(devices) > 4 else ""
        raise CorruptionError(
            f"step {self._step}: {what}: {found[0].array}{others}, on {shown or 'no device that can be told'}{rest}; "
            f"nothing of it is saved. Take {some} out of use. What was saved after step {self._right_at}, the last "
            f"found right, may be wrong too: `python -m launch rewind {self._run.directory} --to {self._right_at}`"
        )


def _to_host(tree: Any) -> Any:
    """Each array -> its shards on this process's devices, copied, every device's own."""
    for array in jax.tree.leaves(tree):
        array.copy_to_host_async()
    return jax.tree.map(lambda array: _Shards(array, [np.array(s.data) for s in array.addressable_shards]), tree)


class _Shards:
    """An array in host memory."""

    def __init__(self, array: jax.Array, parts: list[np.ndarray]):
        self._shape, self._sharding, self._parts = array.shape, array.sharding, parts
        self._devices = [shard.device for shard in array.addressable_shards]

    def on_devices(self) -> jax.Array:
        """The array again, where it was."""
        placed = [jax.device_put(part, device) for part, device in zip(self._parts, self._devices, strict=True)]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, placed)


def _to_devices(copy: Any) -> Any:
    return jax.tree.map(_Shards.on_devices, copy)
