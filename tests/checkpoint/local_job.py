"""One of several processes with a local disk each; arguments: PORT COUNT PROCESS DIRECTORY REPLICA PLATFORM.

On GPUs, Orbax lets one replica write all; it looks at an environment variable, which may say so here, too.
Writes what it has found as JSON. Something goes wrong with the last process's disk only.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tests.checkpoint.job import full_disk
from tests.checkpoint.test_checkpoint import meta, random_state
from tests.checkpoint.test_seal import flip
from tlite_jax.checkpoint import Checkpoint, StateReading, find, steps_on_disk
from tlite_jax.checkpoint.local import LocalTier
from tlite_jax.checkpoint.parts import claim_parts, parts_of, steps_of
from tlite_jax.checkpoint.resume import newest_intact
from tlite_jax.checkpoint.saver import Saver, saver
from tlite_jax.checkpoint.verify import damages_of
from tlite_jax.config import CheckpointConfig, MeshConfig
from tlite_jax.sharding import make_mesh
from tlite_jax.train.state import TrainState


def equal(checkpoint: Checkpoint | None, reading: StateReading | None, state: TrainState, mesh: Mesh) -> bool:
    """Whether a checkpoint holds the very bits of a state, in all shards of this process."""
    assert checkpoint is not None
    restored = (reading or StateReading(checkpoint, mesh)).finish()
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves((state.params, state.optimizer)), strict=True)
    return all(
        np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()
        for array, expected in pairs
        for one, other in zip(array.addressable_shards, expected.addressable_shards, strict=True)
    )


class Job:
    """One run of these processes."""

    def __init__(self, directory: Path, mesh: Mesh) -> None:
        self.run, self.disks, self.mesh = directory / "run", directory / "disks", mesh
        self.run.mkdir(exist_ok=True)
        self.broken = jax.process_index() == jax.process_count() - 1
        self.states = {step: random_state(mesh, seed=step) for step in range(1, 8)}

    def newest(self) -> dict[str, object]:
        """What a start would go on from."""
        multihost_utils.sync_global_devices("harm is done")
        with contextlib.redirect_stderr(io.StringIO()) as told:
            checkpoint, reading = newest_intact(self.run, self.mesh, parts_of(self.run, self.disks, self.mesh))
        assert checkpoint is not None
        found = {"step": checkpoint.step, "part": checkpoint.part, "told": told.getvalue()}
        return {**found, "equal": equal(checkpoint, reading, self.states[checkpoint.step], self.mesh)}

    def save(self, saving: Saver, tier: LocalTier, step: int, *, durable: bool = False) -> list[str]:
        """Saves and waits; returns what has failed."""
        save = saving.save if durable else saving.save_locally
        save(self.states[step], meta(step))
        saving.wait()
        tier.wait(60)
        return saving.failures()

    def go(self) -> dict[str, object]:
        found: dict[str, object] = {}
        parts = claim_parts(self.run, self.disks, self.mesh)
        tier = LocalTier(parts, -1)
        with saver(self.run, CheckpointConfig(keep_latest=9), local=tier) as saving:
            found["saved"] = self.save(saving, tier, 1, durable=True) + self.save(saving, tier, 2)
            found["parts"], found["durable"] = steps_of(parts), steps_on_disk(self.run)
            durable = find(self.run, 1)
            found["durable is intact"] = [str(damage) for damage in damages_of(durable.path)]
            found["durable is equal"] = equal(durable, None, self.states[1], self.mesh)
            found["newest"] = self.newest()
            other = make_mesh(MeshConfig(replica=8, fsdp=1))
            found["of another mesh"] = parts_of(self.run, self.disks, other) is not None
            if self.broken:
                flip(max((parts / "2").rglob("ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size))
            found["flipped"] = self.newest()
            found["set aside"] = (parts / "2.damaged").is_dir()
            found["saved again"] = self.save(saving, tier, 3)
            if self.broken:
                shutil.rmtree(parts)
            found["lost"] = self.newest()
            with full_disk(here=self.broken):
                found["full"] = self.save(saving, tier, 4)
            found["parts of a failed save"] = (parts / "4").exists()
            found["direct"] = self.save(saving, tier, 5, durable=True)
            found["durable after it"] = steps_on_disk(self.run)
            found["healthy again"] = self.save(saving, tier, 6) + self.save(saving, tier, 7, durable=True)
            found["part 7"] = steps_of(parts)
            with full_disk(here=self.broken):
                saving.save(self.states[4], meta(4))  # the local part fails when it is being copied
                saving.wait()
                tier.wait(60)
            found["copy failed"] = saving.failures()
            saving.run_is_done()
        multihost_utils.sync_global_devices("done")
        found["left"] = sorted(path.name for path in self.disks.iterdir())
        found["left of the run"] = sorted(path.name for path in (self.run / "checkpoints").iterdir())
        found["last is equal"] = equal(find(self.run), None, self.states[7], self.mesh)
        return found


if __name__ == "__main__":
    port, count, process, directory, replica, platform = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
    try:
        mesh = make_mesh(MeshConfig(replica=int(replica)))
        os.environ["JAX_PLATFORMS"] = platform
        outcome = Job(Path(directory), mesh).go()
    except Exception:
        traceback.print_exc()
        os._exit(1)  # the other one is not waited for
    (Path(directory) / f"{process}.json").write_text(json.dumps(outcome))
